// sparse_linear: y = x w^T + bias and its gradients, touching the kept weights of w only.
//
// Kept weights are listed by row (and, for dx, by column), the batch is cut into tiles of
// kTileBatch columns, and each product runs over one list and one tile at a time. What is computed
// for an output element never depends on how the work is split: same bits for any thread count,
// and for a replicate alone or among others.
//
// Two callers: a masked weight is listed anew in each call (SparseLinearForward, ...Backward); a
// compact layer keeps its lists and the packed x (CompactLinearForward, ...Backward).
//
// T is float or Bfloat16, which is storage only: packing a tile widens it, all products run on
// floats, and each result is rounded once.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/parallel.h"
#include "common/variants.h"
#include "linear/list_below.h"

namespace lottery_sparse {

// Row-major and contiguous. E = replicates, B = batch, K = in_features, N = out_features.
struct SparseLinearShape {
    int64_t replicates;
    int64_t batch;
    int64_t in_features;
    int64_t out_features;
    bool shared_x;  // one x for all replicates
};

template <class T>
struct SparseLinearForward {
    SparseLinearShape shape;
    const T* x;           // [E, B, K], or [B, K] if shared_x
    const T* weight;      // [E, N, K]; pruned entries are never used
    const uint8_t* mask;  // [E, N, K], not 0 = kept
    const T* bias;        // [E, N], or nullptr
    T* y;                 // [E, B, N], every element is written
};

template <class T>
struct SparseLinearBackward {
    SparseLinearShape shape;
    const T* dy;          // [E, B, N]
    const T* x;           // as above; unused if dw is nullptr
    const T* weight;      // as above
    const uint8_t* mask;  // as above
    T* dx;                // as x (the sum over replicates, in order, if shared_x), or nullptr
    T* dw;                // [E, N, K], 0 at pruned entries, or nullptr
};

// The kept weights of E matrices as lists that stay: C slots a matrix, of which the first are used.
// Those of row r of matrix e are [starts[e][r], starts[e][r + 1]), counted from its first slot.
struct CompactLists {
    const int64_t* starts;         // [E, N + 1]
    const void* columns;           // [E, C], uint16_t or uint32_t (`wide`), ascending within a row
    const int64_t* column_starts;  // [E, K + 1]: the same entries by column
    const void* rows;              // [E, C], type as `columns`, ascending within a column
    const int32_t* positions;      // [E, C]: where an entry by column is among those by row
    int64_t capacity;              // C
    bool wide;
};

template <class T>
struct CompactLinearForward {
    SparseLinearShape shape;
    CompactLists lists;
    const T* x;       // [E, B, K], or [B, K] if shared_x
    const T* values;  // [E, C]
    const T* bias;    // [E, N], or nullptr
    T* y;             // [E, B, N], every element is written
    float* packed_x;  // [E or 1, compact_tiles(B), K, kTileBatch]: for the backward
};

template <class T>
struct CompactLinearBackward {
    SparseLinearShape shape;
    CompactLists lists;
    const T* dy;            // [E, B, N]
    const float* packed_x;  // as above; unused if dvalues is nullptr
    const T* values;        // as above; unused if dx is nullptr
    T* dx;                  // as x (the sum over replicates, in order, if shared_x), or nullptr
    T* dvalues;             // [E, C], 0 in unused slots, or nullptr
    T* dbias;               // [E, N], or nullptr
};

// x [count, B, features] -> tiles [count, compact_tiles(B), features, kTileBatch], zeros beyond B.
void pack_tiles(const float* x, int64_t count, int64_t batch, int64_t features, float* tiles,
                const Parallel& parallel);
void pack_tiles(const Bfloat16* x, int64_t count, int64_t batch, int64_t features, float* tiles,
                const Parallel& parallel);

// Between a dense matrix [E, N, K] and its kept entries [E, C]. Of `lists` only starts, columns,
// capacity and wide are used. Gathering writes 0 to spare slots; scattering leaves the rest alone.
template <class T>
struct KeptEntries {
    SparseLinearShape shape;
    CompactLists lists;
    T* dense;
    T* values;
};
void gather_kept(const KeptEntries<float>& p, const Parallel& parallel);
void gather_kept(const KeptEntries<Bfloat16>& p, const Parallel& parallel);
// The same for rows [begin, end) of one matrix; `dense` holds nothing else. Spare slots become 0
// with the last row.
void gather_rows(const KeptEntries<float>& p, int64_t matrix, int64_t begin, int64_t end,
                 const Parallel& parallel);
void scatter_kept(const KeptEntries<float>& p, const Parallel& parallel);
void scatter_kept(const KeptEntries<Bfloat16>& p, const Parallel& parallel);

void compact_linear_forward(const CompactLinearForward<float>& p, const Parallel& parallel);
void compact_linear_forward(const CompactLinearForward<Bfloat16>& p, const Parallel& parallel);
void compact_linear_backward(const CompactLinearBackward<float>& p, const Parallel& parallel);
void compact_linear_backward(const CompactLinearBackward<Bfloat16>& p, const Parallel& parallel);

template <class T>
void sparse_linear_forward(const SparseLinearForward<T>& p, const Parallel& parallel);
template <class T>
void sparse_linear_backward(const SparseLinearBackward<T>& p, const Parallel& parallel);

constexpr int64_t kTileBatch = 32;  // batch columns of a tile: [features][kTileBatch]
constexpr int64_t kRowBlock = 16;   // rows whose results leave a product together

// The kept entries of the rows of a matrix: those of row r are [starts[r], starts[r + 1]), in
// ascending order of column. Index is uint16_t where it can hold every row and column.
template <class Index>
struct KeptRows {
    const int64_t* starts;
    const Index* columns;
    const float* values;
};

// One tile: out[b][r] = bias[r] + sum over kept (r, c) of value * tile[c][b].
template <class Index>
struct TileProduct {
    KeptRows<Index> rows;
    const float* tile;  // [columns of the matrix][kTileBatch]
    const float* bias;  // by row, or nullptr
    float* out;         // [batch][out_stride]
    int64_t out_stride;
    int64_t batch;             // 1 to kTileBatch
    bool add;                  // add to what out holds
    const ListBounds* bounds;  // to be checked, or nullptr: the lists are known to fit
};

// One tile of the transposed product, read by row: out[b][c] = sum over kept (r, c) of
// value * tile[r][b], for columns [first, last).
template <class Index>
struct ScatterProduct {
    KeptRows<Index> rows;
    int64_t row_count;
    int64_t first;
    int64_t last;
    const float* tile;  // [rows of the matrix][kTileBatch]
    float* sums;        // scratch, [last - first][kTileBatch]
    float* out;         // [batch][out_stride], from column `first` on
    int64_t out_stride;
    int64_t batch;  // 1 to kTileBatch
    bool add;       // add to what out holds
};

// Consecutive tiles: for kept (r, c), the sum over tiles and b of dy[tile][r][b] * x[tile][c][b],
// at dw[r][c], or at the entry's list position in `kept`.
template <class Index>
struct SampledProduct {
    KeptRows<Index> rows;
    const float* dy;  // [tiles][out_features][kTileBatch]
    const float* x;   // [tiles][in_features][kTileBatch]
    float* dw;        // [out_features][in_features], or nullptr
    float* kept;      // by list position, or nullptr
    int64_t tiles;
    int64_t in_features;
    int64_t out_features;
    bool add;                  // add to what is there; if not, whole rows of dw are written
    const ListBounds* bounds;  // as in TileProduct
};

// The same tile product with its result as a tile: out[r][b], rows [begin, end) of it.
template <class Index>
struct PackedProduct {
    KeptRows<Index> rows;
    const float* tile;  // [columns of the matrix][kTileBatch]
    const float* bias;  // by row, or nullptr
    const float* gate;  // [rows][kTileBatch]: results are 0 where it is 0 or less; or nullptr
    float* out;         // [rows][kTileBatch]
    bool relu;
};

template <class Index>
struct SparseLinearKernels {
    // Lists rows [begin, end) of mask and weight [rows, columns] at starts[begin].
    void (*list_rows)(const uint8_t* mask, const float* weight, int64_t columns, int64_t begin,
                      int64_t end, const int64_t* starts, Index* kept_columns, float* values);
    // source [batch][features] -> tile [features][kTileBatch], zeros beyond batch (<= kTileBatch).
    void (*pack_tile)(const float* source, int64_t batch, int64_t features, float* tile);
    // Rows [begin, end); begin is a multiple of kRowBlock. False: a row's list does not fit.
    bool (*multiply)(const TileProduct<Index>& p, int64_t begin, int64_t end);
    void (*multiply_packed)(const PackedProduct<Index>& p, int64_t begin, int64_t end);
    void (*scatter)(const ScatterProduct<Index>& p);
    bool (*sample)(const SampledProduct<Index>& p, int64_t begin, int64_t end);
    // The sum of `tiles` rows of kTileBatch floats, `stride` floats apart.
    float (*sum_row)(const float* row, int64_t tiles, int64_t stride);
    // values[i] = row[kept[i]], for `count` ascending columns of a row.
    void (*gather_row)(const float* row, int64_t columns, const Index* kept, int64_t count,
                       float* values);
    // to[i] = values[positions[i]]. False: a position is not below `slots`.
    bool (*order)(const float* values, const int32_t* positions, int64_t count, int64_t slots,
                  float* to);
};

LS_DECLARE_KERNELS(SparseLinearKernels<uint16_t>, sparse_linear_16);
LS_DECLARE_KERNELS(SparseLinearKernels<uint32_t>, sparse_linear_32);

// The kernels that storage as bfloat16 needs besides. The first three do what their namesakes do.
struct Bfloat16Kernels {
    void (*pack_tile)(const Bfloat16* source, int64_t batch, int64_t features, float* tile);
    void (*list_rows_16)(const uint8_t* mask, const Bfloat16* weight, int64_t columns,
                         int64_t begin, int64_t end, const int64_t* starts, uint16_t* kept_columns,
                         float* values);
    void (*list_rows_32)(const uint8_t* mask, const Bfloat16* weight, int64_t columns,
                         int64_t begin, int64_t end, const int64_t* starts, uint32_t* kept_columns,
                         float* values);
    void (*widen)(const Bfloat16* source, int64_t count, float* target);
    void (*round)(const float* source, int64_t count, Bfloat16* target);
    bool (*order)(const Bfloat16* values, const int32_t* positions, int64_t count, int64_t slots,
                  float* to);  // as above
    void (*gather_row)(const Bfloat16* row, int64_t columns, const uint16_t* kept, int64_t count,
                       Bfloat16* values);
};

LS_DECLARE_KERNELS(Bfloat16Kernels, sparse_linear_bf16);

}  // namespace lottery_sparse
