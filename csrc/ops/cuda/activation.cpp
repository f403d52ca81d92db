#include "../activation.h"

#include <torch/library.h>

#include "../../kernels/activation_kernels.h"
#include "support.h"

namespace scattermoe {

namespace {

at::Tensor activation_cuda(const at::Tensor& z_, std::string_view activation, std::string_view glu_layout, double alpha,
                           double limit) {
    constexpr const char* kOp = "_activation";
    const int64_t width = check_activation(z_, activation, glu_layout).expect_int();
    const c10::cuda::CUDAGuard guard(z_.device());
    const at::Tensor z = z_.contiguous();
    const at::Tensor hidden = at::empty({z.size(0), width}, z.options());
    kernels::ActivationForwardParams p;
    p.dtype = cuda::kernel_dtype(z.scalar_type());
    p.activation = parse_activation_params(kOp, activation, glu_layout, alpha, limit);
    p.z = z.const_data_ptr();
    p.hidden = hidden.mutable_data_ptr();
    p.rows = z.size(0);
    p.width = width;
    cuda::check_launch(kOp, kernels::activation_forward(p, cuda::current_stream()), {{"z", z}});
    return hidden;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_backward_cuda(
    const at::Tensor& grad_hidden_, const at::Tensor& z_, const at::Tensor& gates, const at::Tensor& slot_order_,
    const at::Tensor& expert_offsets_, std::string_view activation, std::string_view glu_layout, double alpha,
    double limit) {
    constexpr const char* kOp = "_activation_backward";
    const int64_t width =
        check_activation_backward(grad_hidden_, z_, gates, slot_order_, expert_offsets_, activation, glu_layout)
            .expect_int();
    const c10::cuda::CUDAGuard guard(z_.device());
    const at::Tensor grad_hidden = grad_hidden_.contiguous(), z = z_.contiguous();
    const at::Tensor slot_order = slot_order_.contiguous(), expert_offsets = expert_offsets_.contiguous();
    const at::Tensor compute_gates = cuda::compute_gates(gates, z.scalar_type());
    const at::Tensor grad_z = at::empty_like(z), gated_hidden = at::empty_like(grad_hidden);
    const at::Tensor grad_gates = at::empty(gates.sizes(), compute_gates.options());
    kernels::ActivationBackwardParams p;
    p.dtype = cuda::kernel_dtype(z.scalar_type());
    p.activation = parse_activation_params(kOp, activation, glu_layout, alpha, limit);
    p.grad_hidden = grad_hidden.const_data_ptr();
    p.z = z.const_data_ptr();
    p.gates = compute_gates.const_data_ptr();
    p.slot_order = slot_order.const_data_ptr<int32_t>();
    p.expert_offsets = expert_offsets.const_data_ptr<int32_t>();
    p.num_experts = cuda::size_32(kOp, "the number of experts", expert_offsets.size(0) - 1);
    p.grad_z = grad_z.mutable_data_ptr();
    p.gated_hidden = gated_hidden.mutable_data_ptr();
    p.grad_gates = grad_gates.mutable_data_ptr();
    p.num_slots = slot_order.size(0);
    p.width = width;
    cuda::check_launch(kOp, kernels::activation_backward(p, cuda::current_stream()),
                       {{"grad_hidden", grad_hidden}, {"z", z}});
    return {grad_z, gated_hidden, cuda::to_dtype(grad_gates, gates.scalar_type())};
}

TORCH_LIBRARY_IMPL(scattermoe, CUDA, m) {
    m.impl("_activation", TORCH_FN(activation_cuda));
    m.impl("_activation_backward", TORCH_FN(activation_backward_cuda));
}

}  // namespace

}  // namespace scattermoe
