// _host: facts about this build and helpers for files. No torch; lottery_sparse works without it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/philox.h"
#include "common/variants.h"
#include "rim/schemas.h"

namespace py = pybind11;

namespace lottery_sparse {
namespace {

#define LS_TEXT_(x) #x
#define LS_TEXT(x) LS_TEXT_(x)

py::dict build_info() {
    py::list compiled, runs_here, ops;
    for (int i = 0; i < kVariants; ++i) {
        const Variant variant = static_cast<Variant>(i);
        if (!variant_compiled(variant)) continue;
        compiled.append(variant_name(variant));
        if (variant_runs_here(variant)) runs_here.append(variant_name(variant));
    }
    for (const char* schema : kSchemas) ops.append(schema);
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["flags"] = LS_BUILD_FLAGS;
    info["stable_abi_target"] = LS_TEXT(TORCH_TARGET_VERSION);
    info["variants_compiled"] = compiled;
    info["variants_usable"] = runs_here;
    info["ops"] = ops;
    return info;
}

// Bytes of a bool mask in C order -> bits, byte i / 8 bit i % 8 (little-endian bit order).
py::bytes pack_bits(const py::buffer& mask) {
    const py::buffer_info info = mask.request();
    if (info.itemsize != 1 || info.ndim != 1)
        throw py::value_error("mask must be a flat buffer of one byte per entry, got " +
                              std::to_string(info.ndim) + " dimensions of " +
                              std::to_string(info.itemsize) + "-byte items.");
    if (info.strides[0] != 1) throw py::value_error("mask must be contiguous; copy it first.");
    const uint8_t* source = static_cast<const uint8_t*>(info.ptr);
    std::string bits((info.size + 7) / 8, '\0');
    for (py::ssize_t i = 0; i < info.size; ++i)
        bits[i / 8] = static_cast<char>(bits[i / 8] | (source[i] != 0) << (i % 8));
    return py::bytes(bits);
}

py::bytes unpack_bits(const py::bytes& bits, py::ssize_t count) {
    const std::string_view source = bits;
    if (count < 0 || static_cast<py::ssize_t>(source.size()) != (count + 7) / 8)
        throw py::value_error("bits has " + std::to_string(source.size()) + " bytes, but " +
                              std::to_string(count) + " entries take " +
                              std::to_string((count + 7) / 8) + ".");
    if (count % 8 && static_cast<uint8_t>(source.back()) >> (count % 8))
        throw py::value_error("bits has ones beyond its " + std::to_string(count) +
                              " entries; it was not written by pack_bits.");
    std::string mask(count, '\0');
    for (py::ssize_t i = 0; i < count; ++i)
        mask[i] = static_cast<char>(static_cast<uint8_t>(source[i / 8]) >> (i % 8) & 1);
    return py::bytes(mask);
}

py::tuple philox_block(uint64_t seed, uint32_t stream, uint32_t step, uint64_t block) {
    const PhiloxBlock out = philox({seed, stream, step}, block);
    return py::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Facts about the native build, and helpers for files.";
    m.def("build_info", &build_info, "Compiler, flags, CPU variants and ops of this build.");
    m.def(
        "cpu_variant", [] { return std::string(variant_name(chosen_variant())); },
        "The CPU variant in use: the best of this machine, or LS_CPU.");
    m.def("pack_bits", &pack_bits, py::arg("mask"),
          "Flat buffer of mask bytes -> bytes of bits, little-endian bit order.");
    m.def("unpack_bits", &unpack_bits, py::arg("bits"), py::arg("count"),
          "The inverse of pack_bits: bytes of `count` zeros and ones.");
    m.def("philox", &philox_block, py::arg("seed"), py::arg("stream"), py::arg("step"),
          py::arg("block"), "The four words of one Philox4x32-10 block.");
}

}  // namespace lottery_sparse
