// The module _C_cuda; bindings_cuda_*.cpp define and implement its ops.
#include <Python.h>
#include <cuda_runtime_api.h>

// Importing the module loads the library; `architectures` says what its kernels are compiled for,
// `toolkit` by which CUDA.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    PyObject* module = PyModule_Create(&definition);
    if (module && (PyModule_AddStringConstant(module, "architectures", LS_CUDA_ARCHITECTURES) ||
                   PyModule_AddIntConstant(module, "toolkit", CUDART_VERSION))) {
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
