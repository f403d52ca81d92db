#include "activation.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../activation.h"
#include "../checks.h"
#include "grouping.h"
#include "memory.h"
#include "row_kernels.h"

namespace scattermoe {

namespace cpu {

int64_t rows_per_task(int64_t width) {
    constexpr int64_t kElementsPerTask = 1 << 13;
    return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, width));
}

void apply_activation(const ActivationParams& params, const at::Tensor& hidden, const at::Tensor& z) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, z.scalar_type(), "activation", [&] {
        scalar_t* h = hidden.mutable_data_ptr<scalar_t>();
        const scalar_t* z_ = z.const_data_ptr<scalar_t>();
        const int64_t h_width = hidden.size(1), z_width = z.size(1);
        at::parallel_for(0, z.size(0), rows_per_task(z_width), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                activation_forward<scalar_t>(params, h + i * h_width, z_ + i * z_width, h_width);
            }
        });
    });
}

}  // namespace cpu

namespace {

at::Tensor activation_cpu(const at::Tensor& z, std::string_view activation, std::string_view glu_layout, double alpha,
                          double limit) {
    const int64_t width = check_activation(z, activation, glu_layout).expect_int();
    at::Tensor hidden = cpu::empty({z.size(0), width}, z.options());
    cpu::apply_activation(parse_activation_params("_activation", activation, glu_layout, alpha, limit), hidden,
                          z.contiguous());
    return hidden;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_backward_cpu(
    const at::Tensor& grad_hidden, const at::Tensor& z, const at::Tensor& gates, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout, double alpha,
    double limit) {
    constexpr const char* kOp = "_activation_backward";
    const int64_t width =
        check_activation_backward(grad_hidden, z, gates, slot_order, expert_offsets, activation, glu_layout)
            .expect_int();
    const ActivationParams params = parse_activation_params(kOp, activation, glu_layout, alpha, limit);
    const cpu::Grouping grouping(kOp, slot_order, expert_offsets);
    const int64_t num_rows = grouping.num_rows(), num_sentinels = grouping.num_slots() - num_rows;
    const int64_t z_width = z.size(1);
    const at::Tensor grad_ = grad_hidden.contiguous(), z_ = z.contiguous();
    const at::Tensor gates_ = gates.to(compute_dtype(z.scalar_type())).contiguous();
    at::Tensor grad_z = cpu::empty(z.sizes(), z.options());
    at::Tensor gated_hidden = cpu::empty(grad_hidden.sizes(), z.options());
    at::Tensor grad_gates = at::zeros(gates.sizes(), gates_.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, z.scalar_type(), kOp, [&] {
        using Acc = cpu::Compute<scalar_t>;
        const scalar_t* dh = grad_.const_data_ptr<scalar_t>();
        const scalar_t* z_rows = z_.const_data_ptr<scalar_t>();
        const Acc* gate = gates_.const_data_ptr<Acc>();
        const int32_t* slots = grouping.slots(0);
        scalar_t* dz = grad_z.mutable_data_ptr<scalar_t>();
        scalar_t* gated = gated_hidden.mutable_data_ptr<scalar_t>();
        Acc* grad_gate = grad_gates.mutable_data_ptr<Acc>();
        at::parallel_for(0, num_rows, cpu::rows_per_task(z_width), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                grad_gate[slots[i]] =
                    cpu::activation_backward<scalar_t>(params, dz + i * z_width, gated + i * width,
                                                       z_rows + i * z_width, dh + i * width, gate[slots[i]], width);
            }
        });
    });
    grad_z.narrow(0, num_rows, num_sentinels).zero_();
    gated_hidden.narrow(0, num_rows, num_sentinels).zero_();
    return {grad_z, gated_hidden, grad_gates.to(gates.scalar_type())};
}

TORCH_LIBRARY_IMPL(scattermoe, CPU, m) {
    m.impl("_activation", TORCH_FN(activation_cpu));
    m.impl("_activation_backward", TORCH_FN(activation_backward_cpu));
}

}  // namespace

}  // namespace scattermoe
