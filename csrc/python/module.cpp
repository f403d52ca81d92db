// scattermoe._C: what Python wants to know that is not a tensor operation. Neither PyTorch nor libscattermoe is linked
// here, so that this module loads, and can explain itself, even where they do not fit together.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "kernels/select.h"
#include "kernels/sm90/select.h"

namespace py = pybind11;
using namespace py::literals;

namespace scattermoe {

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

kernels::DType parse_dtype(const std::string& name) {
    if (name == "bfloat16") return kernels::DType::kBFloat16;
    if (name == "float16") return kernels::DType::kFloat16;
    if (name == "float32") return kernels::DType::kFloat32;
    if (name == "float64") return kernels::DType::kFloat64;
    throw py::value_error("expected dtype to be bfloat16, float16, float32 or float64, got " + name);
}

const char* engine_name(kernels::GemmEngine engine) {
    switch (engine) {
        case kernels::GemmEngine::kSimt:
            return "fma";
        case kernels::GemmEngine::kTensorCore:
            return "mma.sync";
        case kernels::GemmEngine::kHopper:
            return "wgmma";
    }
    return "unknown";
}

py::dict explain(const std::string& dtype, int64_t rows, int64_t num_experts, std::optional<int> arch,
                 bool weight_gradient, bool allow_tf32, bool aligned) {
    const kernels::DType type = parse_dtype(dtype);
    if (rows < 0 || num_experts < 1) {
        throw py::value_error("expected rows >= 0 and num_experts >= 1, got " + std::to_string(rows) + " and " +
                              std::to_string(num_experts));
    }
    if (!arch.has_value()) {
        return py::dict("engine"_a = "ATen", "tile"_a = py::none(), "stages"_a = py::none(),
                        "why"_a =
                            "one product for each expert, experts side by side on threads; the largest run "
                            "alone with all threads where the others would wait for them");
    }
    if (*arch < 80) throw py::value_error("expected arch >= 80, got " + std::to_string(*arch));
    const bool hopper = *arch == 90 && aligned && kernels::size_of(type) == 2;
    kernels::GemmQuery query{type, allow_tf32, *arch, aligned, rows, num_experts, weight_gradient};
    query.hopper = hopper;
    const kernels::GemmChoice choice = kernels::select_gemm(query);
    if (choice.engine == kernels::GemmEngine::kHopper) {
        namespace sm90 = kernels::sm90;
        const sm90::TileChoice tile = weight_gradient
                                          ? sm90::select_weight_grad_tile(query.columns, sm90::GatheredSide::kNeither)
                                          : sm90::select_store_tile(query.columns, query.columns, /*gathered=*/false,
                                                                    /*weight_k_contiguous=*/true);
        const sm90::TileShape shape = sm90::tile_shape(tile.tile);
        return py::dict("engine"_a = engine_name(choice.engine),
                        "tile"_a = py::make_tuple(shape.m, shape.n, sm90::kStageK),
                        "stages"_a = sm90::stage_count(tile.tile), "why"_a = tile.why);
    }
    const kernels::GemmTile tile = kernels::tile_shape(choice.tile);
    return py::dict("engine"_a = engine_name(choice.engine),
                    "tile"_a = py::make_tuple(tile.m, tile.n, tile.k_elements(kernels::size_of(type))),
                    "stages"_a = tile.stages, "why"_a = choice.why);
}

}  // namespace

}  // namespace scattermoe

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build information of the scattermoe library, and which kernel a product takes.";
    m.def("build_info", &scattermoe::build_info,
          "What the library was built from: version, torch, compiler, flags, cuda (None for a CPU build), cuda_archs.");
    m.def("explain", &scattermoe::explain, "dtype"_a, "rows"_a, "num_experts"_a, py::kw_only(), "arch"_a = py::none(),
          "weight_gradient"_a = false, "allow_tf32"_a = false, "aligned"_a = true,
          R"(Which kernel a grouped matrix product takes, and why; no GPU is needed to ask.

Args:
    dtype: "bfloat16", "float16", "float32" or "float64".
    rows: slots in all, over every expert.
    num_experts: E.
    arch: architecture of the compiled code, such as 80 or 90; None for the CPU.
    weight_gradient: the product that contracts over the rows.
    allow_tf32: whether float32 operands may be rounded to TF32.
    aligned: whether every row of both operands starts at a multiple of 16 bytes.

Returns:
    A dict of engine, tile (m, n, k), stages and why.

Raises:
    ValueError: An unknown dtype or an impossible size.

Example:
    >>> scattermoe._C.explain("bfloat16", rows=65536, num_experts=64, arch=80)["engine"]
    'mma.sync'
)");
}
