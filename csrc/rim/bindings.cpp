// The rim of _C: its ops, which bindings_*.cpp implement, and its module.
#include <Python.h>

#include "common/variants.h"
#include "rim/rim.h"
#include "rim/schemas.h"

namespace lottery_sparse {
namespace {

int64_t numerics_op() {
    return variant_numerics(chosen_variant());
}

}  // namespace

STABLE_TORCH_LIBRARY(lottery_sparse_native, m) {
    for (const char* schema : kSchemas) m.def(schema);
}

// These take no tensor, so no device chooses the kernel.
STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CompositeExplicitAutograd, m) {
    m.impl("numerics", TORCH_BOX(&numerics_op));
    m.impl("threads_used", TORCH_BOX(&threads_used));
}

}  // namespace lottery_sparse

// Importing the module loads the library, which registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
