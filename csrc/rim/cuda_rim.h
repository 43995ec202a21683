// What the files of the rim of _C_cuda share: CUDA tensors in, pointers and their device out.
#pragma once

#include <cuda_runtime_api.h>

#define USE_CUDA  // declares the stream functions of the next header
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/device.h"
#include "rim/rim.h"

namespace lottery_sparse {

// `t`, contiguous, after checking that it is on the device of x.
inline Tensor checked_on(const char* name, const Tensor& t, const Tensor& x) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name,
                    " must be on the CUDA device of x.");
    return torch::stable::contiguous(t);
}

inline Number number_of(const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return Number::kFloat;
        case ScalarType::Half:
            return Number::kFloat16;
        case ScalarType::BFloat16:
            return Number::kBFloat16;
        default:
            STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ",
                            toString(t.scalar_type()), ".");
    }
}

inline Device device_of(const Tensor& x) {
    const int index = x.get_device_index();
    Device device = {};
    const cudaError_t failed[] = {
        cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index),
        cudaDeviceGetAttribute(&device.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
    for (cudaError_t error : failed)
        STD_TORCH_CHECK(error == cudaSuccess, "device ", index, ": ", cudaGetErrorString(error));
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &device.stream) == 0, "device ",
                    index, " has no current stream.");
    return device;
}

inline void check_launch(const char* error) {
    STD_TORCH_CHECK(!error, "the CUDA kernel did not start: ", error,
                    "; `python -m lottery_sparse doctor` says for what it is built.");
}

}  // namespace lottery_sparse
