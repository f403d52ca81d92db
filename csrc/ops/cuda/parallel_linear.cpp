#include "../parallel_linear.h"

#include <torch/library.h>

#include "products.h"
#include "support.h"

namespace scattermoe {

namespace {

at::Tensor parallel_linear_cuda(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                const at::Tensor& slot_order, const at::Tensor& expert_offsets, c10::SymInt top_k,
                                bool grouped_in, bool grouped_out, std::optional<bool> allow_tf32) {
    check_parallel_linear(x, weight, bias, slot_order, expert_offsets, top_k, grouped_in);
    const c10::cuda::CUDAGuard guard(x.device());
    const cuda::Groups groups(slot_order, expert_offsets);
    return cuda::grouped_product("parallel_linear",
                                 {x, grouped_in ? groups.grouped() : groups.by_token(top_k.expect_int())}, {weight},
                                 bias, grouped_out ? groups.grouped() : groups.by_slot(), groups,
                                 cuda::resolve_allow_tf32(allow_tf32, x.scalar_type()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> parallel_linear_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, c10::SymInt top_k_, bool grouped_in, bool grouped_out,
    std::optional<bool> allow_tf32_, std::array<bool, 3> output_mask) {
    constexpr const char* kOp = "_parallel_linear_backward";
    check_parallel_linear_backward(grad, x, weight, slot_order, expert_offsets, top_k_, grouped_in, output_mask);
    const c10::cuda::CUDAGuard guard(grad.device());
    const cuda::Groups groups(slot_order, expert_offsets);
    const int64_t top_k = top_k_.expect_int();
    const bool allow_tf32 = cuda::resolve_allow_tf32(allow_tf32_, grad.scalar_type());
    const cuda::MappedRows grad_rows{cuda::with_contiguous_rows(grad),
                                     grouped_out ? groups.grouped() : groups.by_slot()};
    const auto [need_x, need_weight, need_bias] = output_mask;

    at::Tensor grad_x, grad_weight, grad_bias;
    if (need_x) {
        // The gradient of every slot's copy of its row, zero for sentinels, in x's order: a token's are neighbours.
        grad_x = cuda::grouped_product(kOp, grad_rows, {weight, /*transposed=*/true}, /*bias=*/std::nullopt,
                                       grouped_in ? groups.grouped() : groups.by_slot(), groups, allow_tf32);
        if (top_k > 1) {
            grad_x = cuda::combine_rows(kOp, grad_x, /*gates=*/at::Tensor(), /*slot_position=*/at::Tensor(), top_k,
                                        /*grouped=*/false);
        }
    }
    if (need_weight) {
        grad_weight = at::empty_like(weight);
        cuda::weight_gradient(kOp, grad_rows, {x, grouped_in ? groups.grouped() : groups.by_token(top_k)}, grad_weight,
                              groups, allow_tf32);
    }
    if (need_bias) grad_bias = cuda::bias_gradient(kOp, grad_rows, /*gates=*/at::Tensor(), groups);
    return {or_empty(grad_x, grad), or_empty(grad_weight, grad), or_empty(grad_bias, grad)};
}

TORCH_LIBRARY_IMPL(scattermoe, CUDA, m) {
    m.impl("parallel_linear", TORCH_FN(parallel_linear_cuda));
    m.impl("_parallel_linear_backward", TORCH_FN(parallel_linear_backward_cuda));
}

}  // namespace

}  // namespace scattermoe
