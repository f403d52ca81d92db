#include "matmul.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "gemm_avx512.h"

namespace scattermoe::cpu {

namespace {

// Asked for by PyTorch's own name, so that ATEN_CPU_CAPABILITY in the environment decides here as well.
bool has_avx512() {
    static const bool result = has_gemm_avx512() && at::get_cpu_capability() == "AVX512";
    return result;
}

// Whether the calling thread is all there is to work on a product.
bool on_one_thread() {
    return at::in_parallel_region() || at::get_num_threads() == 1;
}

bool can_gemm_avx512(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
    return out.scalar_type() == at::kFloat && has_avx512() && on_one_thread() && a.size(1) > 0 && out.stride(1) == 1 &&
           (b.stride(1) == 1 || (b.stride(0) == 1 && a.stride(1) == 1));
}

}  // namespace

void matmul(at::Tensor out, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
    if (!bias.has_value() && out.stride(1) != 1 && out.stride(0) == 1) return matmul(out.t(), b.t(), a.t());
    if (can_gemm_avx512(out, a, b)) {
        if (bias.has_value()) out.copy_(*bias);
        return gemm_avx512({
            .out = out.mutable_data_ptr<float>(),
            .out_stride = out.stride(0),
            .a = a.const_data_ptr<float>(),
            .a_row_stride = a.stride(0),
            .a_column_stride = a.stride(1),
            .b = b.const_data_ptr<float>(),
            .b_row_stride = b.stride(0),
            .b_column_stride = b.stride(1),
            .m = out.size(0),
            .n = out.size(1),
            .k = a.size(1),
            .accumulate = bias.has_value(),
        });
    }
    if (bias.has_value()) {
        at::addmm_out(out, *bias, a, b);
    } else {
        at::mm_out(out, a, b);
    }
}

}  // namespace scattermoe::cpu
