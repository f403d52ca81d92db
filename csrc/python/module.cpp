// scattermoe._C: what Python wants to know that is not a tensor operation. Neither PyTorch nor libscattermoe is linked
// here, so that this module loads, and can explain itself, even where they do not fit together.

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

py::object none_if_empty(const char* text) {
    return *text ? py::object(py::str(text)) : py::none();
}

py::dict build_info() {
    py::dict info;
    info["version"] = SCATTERMOE_VERSION;
    info["torch"] = SCATTERMOE_TORCH_VERSION;
    info["compiler"] = SCATTERMOE_COMPILER;
    info["flags"] = SCATTERMOE_COMPILE_FLAGS;
    info["cuda"] = none_if_empty(SCATTERMOE_CUDA_VERSION);
    info["cuda_archs"] = py::str(SCATTERMOE_CUDA_ARCHS).attr("split")();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build information of the scattermoe library.";
    m.def("build_info", &build_info,
          "What the library was built from: version, torch, compiler, flags, cuda (None for a CPU build), cuda_archs.");
}
