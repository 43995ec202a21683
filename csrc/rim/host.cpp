// _host: facts about this build, and Philox for the tests. It knows no torch; lottery_sparse works
// without it.
#include <pybind11/pybind11.h>

#include <cstdint>
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

py::tuple philox_block(uint64_t seed, uint32_t stream, uint32_t step, uint64_t block) {
    const PhiloxBlock out = philox({seed, stream, step}, block);
    return py::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Facts about the native build, and Philox.";
    m.def("build_info", &build_info, "Compiler, flags, CPU variants and ops of this build.");
    m.def(
        "cpu_variant", [] { return std::string(variant_name(chosen_variant())); },
        "The CPU variant in use: the best of this machine, or LS_CPU.");
    m.def("philox", &philox_block, py::arg("seed"), py::arg("stream"), py::arg("step"),
          py::arg("block"), "The four words of one Philox4x32-10 block.");
}

}  // namespace lottery_sparse
