// The ops of torch.ops.lottery_sparse_native: bindings.cpp defines them, host.cpp lists them.
#pragma once

namespace lottery_sparse {

// These three are in torch.ops.lottery_sparse_eager as well.
constexpr const char* kSgdStep =
    "sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] effective, "
    "Tensor[] starts, Tensor[] columns, int[] owners, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, bool first) -> int";
constexpr const char* kAdamStep =
    "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] effective, Tensor[] starts, "
    "Tensor[] columns, int[] owners, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool maximize) -> int";

constexpr const char* kThreadsUsed = "threads_used() -> int";

constexpr const char* kSchemas[] = {
    "numerics() -> int",
    "keep_top(Tensor[] scores, Tensor[] masks, int count, int seed, int[] streams) -> Tensor[]",
    "count_kept(Tensor mask) -> int",
    "pack_mask(Tensor mask) -> Tensor",
    "unpack_mask(Tensor bits, int columns) -> Tensor",
    "select_kept(Tensor values, Tensor mask, Tensor? others) -> Tensor",
    "put_back_(Tensor(a!) weight, Tensor mask, Tensor? frozen) -> bool",
    "random_words(int count, int seed, int stream, int step) -> Tensor",
    "random_signs(int count, int seed, int stream, int step) -> Tensor",
    "random_uniform(int count, int seed, int stream, int step) -> Tensor",
    "random_normal(int count, int seed, int stream, int step, Tensor table) -> Tensor",
    "sample_mask(Tensor score, int seed, int stream, int step) -> Tensor",
    "masked_linear(Tensor x, Tensor weight, Tensor mask, Tensor? bias) -> Tensor",
    "masked_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor mask, bool need_dx, "
    "bool need_dw) -> (Tensor, Tensor)",
    "compact_linear(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias) "
    "-> (Tensor, Tensor)",
    "compact_linear_backward(Tensor dy, Tensor packed_x, Tensor values, Tensor starts, "
    "Tensor columns, Tensor column_starts, Tensor rows, Tensor positions, bool shared_x, "
    "bool need_dx, bool need_dvalues, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    "train_step(Tensor x, Tensor labels, Tensor(a!)[] parameters, Tensor(b!)[] first, "
    "Tensor(c!)[] second, Tensor(d!)[] steps, Tensor(e!)[] effective, Tensor[] lists, "
    "int[] zero, int[] keep_effective, Tensor[] frozen, Tensor(f!)[] keys, int[] rescale, "
    "float[] rates, bool adam, int networks, int threads, float[] limits) -> Tensor",
    "pack_tiles(Tensor x) -> Tensor",
    "gather_kept(Tensor dense, Tensor starts, Tensor columns) -> Tensor",
    "scatter_kept_(Tensor(a!) dense, Tensor values, Tensor starts, Tensor columns) -> ()",
    kSgdStep,
    kAdamStep,
    kThreadsUsed,
    "compact_conv2d(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool channels_last) -> Tensor",
    "compact_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor starts, "
    "Tensor columns, Tensor column_starts, Tensor rows, Tensor positions, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool channels_last, bool need_dx, "
    "bool need_dvalues, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    "ternary_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int rows, bool int8) "
    "-> Tensor",
    "csr_linear(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias) -> Tensor",
    "bitmap_linear(Tensor x, Tensor values, Tensor starts, Tensor bits, Tensor? bias) -> Tensor",
};

}  // namespace lottery_sparse
