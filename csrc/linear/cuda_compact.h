// Products with the kept weights of a compact layer on a GPU, for training above about 95%
// sparsity: y = x W^T + b, dx = dy W, and dW = dy^T x at the kept entries only.
//
// Unstructured entries leave nothing for the matrix units: what bounds a product is the shared
// memory from which each entry reads its column of x for all rows of x. So x is packed into panels,
// 128 bytes of rows of x for each column: 8 lanes read them in one go without bank conflicts, and 4
// entries of a row are four such reads. A block holds a chunk of the columns of a panel and takes
// the entries of its rows that fall there, while the next chunk is on its way; where so few entries
// are left that chunks would be more bytes than they are, each reads from global memory. Sums are
// in float, in an order that is fixed: the same bits in every run.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace lottery_sparse {

constexpr int kPanelBytes = 128;

// Rows of x in a panel: 32 of 4 bytes, 64 of 2.
constexpr int64_t panel_rows(Number type) {
    return type == Number::kFloat ? 32 : 64;
}

// x -> panels, zeros beyond the batch; and values in the order of other lists, if there are any.
struct CudaPack {
    int64_t networks;     // E, or 1 where they share x
    int64_t batch;        // B
    int64_t in_features;  // K
    const void* x;        // [E, B, K]
    void* panels;         // [E, ceil(B / rows of a panel), K, rows of a panel]
    Number type;          // of all numbers

    int64_t lists;             // E, or 0: no values
    int64_t slots;             // C
    int64_t ends;              // starts of a network
    const int64_t* starts;     // [E, ends]: the last one of a network says how many are kept
    const int32_t* positions;  // [E, C]
    const void* values;        // [E, C]
    void* ordered;             // [E, C]: values[positions]
};

// Entries by row: those of row n are [starts[n], starts[n + 1]), ascending in column.
struct CudaKept {
    const int64_t* starts;  // [E, N + 1]
    const void* columns;    // [E, C], uint16_t or int32_t (`wide`)
    int64_t slots;          // C
    bool wide;
};

struct CudaCompact {
    int64_t networks;      // E
    int64_t batch;         // B
    int64_t in_features;   // K
    int64_t out_features;  // N
    bool shared_x;         // one x for all networks
    Number type;           // of x, values, bias and y
    CudaKept kept;
    const void* panels;  // of x
    const void* values;  // [E, C]
    const void* bias;    // [E, N], or nullptr
    void* y;             // [E, B, N], every element is written
    int64_t chunk;       // columns of x in shared memory; the driver's
};

struct CudaDvalues {
    int64_t networks, batch, in_features, out_features;
    bool shared_x;
    Number type;
    CudaKept kept;
    const void* panels;     // of x
    const void* dy_panels;  // of dy
    float* partial;         // [ceil(B / rows of a panel), E, C]
    void* dvalues;          // [E, C], 0 in spare slots
    int64_t chunk, rows;    // of a warp; the driver's
};

// Where the kept values lie in a dense weight.
struct CudaScatter {
    int64_t networks, rows, row_length;
    CudaKept kept;
    const void* values;  // [E, C]
    void* dense;         // [E, N, row length]
    Number values_type, dense_type;
};

// Each returns nullptr, or the message of CUDA, and sets the fields of the driver itself.
const char* cuda_compact_pack(const CudaPack& p, const Device& device);
const char* cuda_compact_linear(CudaCompact p, const Device& device);
const char* cuda_compact_dvalues(CudaDvalues p, const Device& device);
const char* cuda_scatter_kept(const CudaScatter& p, const Device& device);

}  // namespace lottery_sparse
