#include "../topk_gating.h"

#include <torch/library.h>

#include "../../kernels/topk_gating.h"
#include "support.h"

namespace scattermoe {

namespace {

std::tuple<at::Tensor, at::Tensor> topk_gating_cuda(const at::Tensor& logits, c10::SymInt k, std::string_view scoring,
                                                    bool normalize, const std::optional<at::Tensor>& selection_bias,
                                                    c10::SymInt num_groups, c10::SymInt top_groups, double scale) {
    constexpr const char* kOp = "topk_gating";
    check_topk_gating(logits, k, scoring, selection_bias, num_groups, top_groups);
    const c10::cuda::CUDAGuard guard(logits.device());
    const at::ScalarType dtype = compute_dtype(logits.scalar_type());
    const at::Tensor logits_ = logits.contiguous();
    const at::Tensor bias =
        has_value(selection_bias) ? cuda::to_dtype(*selection_bias, dtype).contiguous() : at::Tensor();
    at::Tensor gates = at::empty({logits.size(0), k.expect_int()}, logits.options().dtype(dtype));
    at::Tensor expert_ids = at::empty(gates.sizes(), logits.options().dtype(at::kLong));

    kernels::TopkGatingParams p;
    p.dtype = cuda::kernel_dtype(logits.scalar_type());
    p.logits = logits_.const_data_ptr();
    p.bias = cuda::data_or_null(bias);
    p.scoring = parse_scoring(kOp, scoring);
    p.normalize = normalize;
    p.scale = scale;
    p.num_tokens = logits.size(0);
    p.num_experts = cuda::size_32(kOp, "logits.size(1)", logits.size(1));
    p.k = static_cast<int32_t>(gates.size(1));
    p.num_groups = static_cast<int32_t>(num_groups.expect_int());
    p.top_groups = static_cast<int32_t>(top_groups.expect_int());
    p.gates = gates.mutable_data_ptr();
    p.expert_ids = expert_ids.mutable_data_ptr<int64_t>();
    cuda::check_launch(kOp, kernels::topk_gating(p, cuda::current_stream()), {{"logits", logits}, {"gates", gates}});
    return {gates, expert_ids};
}

at::Tensor topk_gating_backward_cuda(const at::Tensor& grad_gates, const at::Tensor& logits,
                                     const at::Tensor& expert_ids, std::string_view scoring, bool normalize,
                                     double scale) {
    constexpr const char* kOp = "_topk_gating_backward";
    check_topk_gating_backward(grad_gates, logits, expert_ids, scoring);
    const c10::cuda::CUDAGuard guard(logits.device());
    const at::Tensor logits_ = logits.contiguous(), ids = expert_ids.contiguous();
    const at::Tensor grad = cuda::to_dtype(grad_gates, compute_dtype(logits.scalar_type())).contiguous();
    at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());

    kernels::TopkGatingBackwardParams p;
    p.dtype = cuda::kernel_dtype(logits.scalar_type());
    p.grad_gates = grad.const_data_ptr();
    p.logits = logits_.const_data_ptr();
    p.expert_ids = ids.const_data_ptr<int64_t>();
    p.scoring = parse_scoring(kOp, scoring);
    p.normalize = normalize;
    p.scale = scale;
    p.num_tokens = logits.size(0);
    p.num_experts = cuda::size_32(kOp, "logits.size(1)", logits.size(1));
    p.k = static_cast<int32_t>(ids.size(1));
    p.grad_logits = grad_logits.mutable_data_ptr();
    cuda::check_launch(kOp, kernels::topk_gating_backward(p, cuda::current_stream()),
                       {{"logits", logits}, {"expert_ids", expert_ids}});
    return grad_logits;
}

TORCH_LIBRARY_IMPL(scattermoe, CUDA, m) {
    m.impl("topk_gating", TORCH_FN(topk_gating_cuda));
    m.impl("_topk_gating_backward", TORCH_FN(topk_gating_backward_cuda));
}

}  // namespace

}  // namespace scattermoe
