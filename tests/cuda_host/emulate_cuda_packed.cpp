// What the tests call of the kernels of packed inference and of their layouts; see emulate_cuda.h.
#include "packed/bitmap_fragments.h"
#include "packed/cuda_linear.h"
#include "packed/ternary_fragments.h"
#include "packed/tile_fragments.h"

using namespace lottery_sparse;

// Row and column, in a tile, of weight `half` of pair `i` of word `word` of a lane.
extern "C" void ls_ternary_weight(int lane, int word, int i, int half, int* row, int* column) {
    *row = ternary_row(lane, word);
    *column = 16 * ternary_word(lane) + ternary_column(i, half);
}

// Bytes from the start of a tile to the weight at a row and column.
extern "C" int ls_tile_place(int row, int column) {
    return tile_place(row, column);
}

// 32 word + bit of the weight at a place.
extern "C" int ls_bitmap_bit(int place) {
    return 32 * bitmap_word(place) + bitmap_bit(place);
}

extern "C" int64_t ls_tiles_splits(bool bitmap, int64_t batch, int64_t in_features, int shared) {
    const Device device = {1, shared, nullptr};
    return bitmap ? cuda_bitmap_splits(batch, in_features, device)
                  : cuda_tiles_splits(batch, in_features, device);
}

extern "C" const char* ls_emulate_tiles(bool bitmap, const CudaLinear* linear,
                                        const uint32_t* starts, const uint8_t* data, int processors,
                                        int shared) {
    const CudaTiles p = {*linear, starts, data, 0};
    const Device device = {processors, shared, nullptr};
    return bitmap ? cuda_bitmap_linear(p, device) : cuda_tiles_linear(p, device);
}

extern "C" bool ls_csr_fits(int64_t batch, int64_t in_features, int shared) {
    return cuda_csr_fits(batch, in_features, {1, shared, nullptr});
}

extern "C" const char* ls_emulate_csr(const CudaLinear* linear, const int64_t* starts,
                                      const uint16_t* columns, const uint16_t* values,
                                      int processors, int shared) {
    return cuda_csr_linear({*linear, starts, columns, values}, {processors, shared, nullptr});
}

extern "C" const char* ls_emulate_rows(const void* x, int type, int64_t batch, int64_t in_features,
                                       uint16_t* rows, float* scale) {
    return cuda_rows({x, static_cast<Number>(type), batch, in_features, rows, scale}, {});
}

extern "C" int64_t ls_ternary_splits(int64_t batch, int64_t in_features, int shared) {
    return cuda_ternary_splits(batch, in_features, {1, shared, nullptr});
}

extern "C" const char* ls_emulate_ternary(const CudaLinear* linear, const CudaScale* scale,
                                          const uint32_t* codes, int processors, int shared) {
    return cuda_ternary_linear({*linear, *scale, codes, 0}, {processors, shared, nullptr});
}
