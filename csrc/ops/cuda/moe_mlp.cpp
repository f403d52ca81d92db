#include "../moe_mlp.h"

#include <torch/library.h>

#include "../../kernels/activation_kernels.h"
#include "../../kernels/select.h"
#include "products.h"
#include "support.h"

namespace scattermoe {

namespace {

struct Forward {
    at::Tensor y;
    at::Tensor z;  // pre-activations, grouped
};

Forward forward(const char* op, const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                const ActivationParams& activation, std::optional<bool> allow_tf32_, bool want_z) {
    const c10::cuda::CUDAGuard guard(x.device());
    const cuda::Groups groups(slot_order, expert_offsets);
    const int64_t top_k = slot_position.size(1);
    const bool allow_tf32 = cuda::resolve_allow_tf32(allow_tf32_, x.scalar_type());
    cuda::UpProjection up = cuda::up_projection(op, {x, groups.by_token(top_k)}, {w_up}, b_up, w_down.size(2),
                                                activation, groups, allow_tf32, want_z);
    if (!want_z) up.z.reset();
    const at::Tensor rows = cuda::grouped_product(op, {up.hidden, groups.grouped()}, {w_down}, b_down, groups.grouped(),
                                                  groups, allow_tf32);
    up.hidden.reset();
    const at::Tensor y = cuda::combine_rows(op, rows, cuda::compute_gates(gates, x.scalar_type()), slot_position, top_k,
                                            /*grouped=*/true);
    return {y, up.z};
}

at::Tensor moe_mlp_cuda(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                        const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                        const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                        std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                        std::optional<bool> allow_tf32, bool /*recompute*/) {
    check_moe_mlp(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                  glu_layout);
    return forward("moe_mlp", x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets,
                   parse_activation_params("moe_mlp", activation, glu_layout, alpha, limit), allow_tf32,
                   /*want_z=*/false)
        .y;
}

std::tuple<at::Tensor, at::Tensor> moe_mlp_forward_cuda(
    const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up, const at::Tensor& w_down,
    const std::optional<at::Tensor>& b_down, const at::Tensor& gates, const at::Tensor& slot_order,
    const at::Tensor& slot_position, const at::Tensor& expert_offsets, std::string_view activation,
    std::string_view glu_layout, double alpha, double limit, std::optional<bool> allow_tf32) {
    check_moe_mlp(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                  glu_layout);
    Forward result =
        forward("_moe_mlp_forward", x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets,
                parse_activation_params("_moe_mlp_forward", activation, glu_layout, alpha, limit), allow_tf32,
                /*want_z=*/true);
    return {result.y, result.z};
}

// With rows of a slot s of token t and expert e, dO = dL/dy[t], g its gate, A = act(z):
//   dA' = dO W_down, so that dL/dA = g dA' and dL/dg = <dO, A W_down^T + b_down> = <dA', A> + <dO, b_down>
//   dL/dz = g dA' act'(z);  dL/dx[t] = sum of its slots' dL/dz W_up
//   dL/dW_down = sum of dO^T (g A);  dL/dW_up = sum of (dL/dz)^T x[t];  dL/db_up = sum of dL/dz;  dL/db_down = sum of g
//   dO
//
// The order is that of the least memory: of what has a row for each slot no two are there at a time that need not be,
// and the gradient of w_up, the largest, is made when only dL/dz is left beside it. But for the rows dL/dz W_up: where
// place_of_sum() finds it worth the memory, they come right before a gradient of weights, which then begins before they
// are all there, and stay until it has summed them, where it can, or is done. With kOverZ dL/dz takes the place of z,
// element by element.
template <bool kOverZ>
MoeMlpGrads moe_mlp_backward_cuda(const at::Tensor& grad_, const at::Tensor& x, const at::Tensor& w_up,
                                  const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                                  const at::Tensor& gates, const at::Tensor& z_, const at::Tensor& slot_order,
                                  const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                                  std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                                  std::optional<bool> allow_tf32_, std::array<bool, kNumMoeMlpGrads> output_mask) {
    constexpr const char* kOp = "_moe_mlp_backward";
    check_moe_mlp_backward(grad_, x, w_up, w_down, b_down, gates, z_, slot_order, slot_position, expert_offsets,
                           activation, glu_layout, output_mask);
    const c10::cuda::CUDAGuard guard(grad_.device());
    const cuda::Groups groups(slot_order, expert_offsets);
    const int64_t top_k = slot_position.size(1);
    const bool allow_tf32 = cuda::resolve_allow_tf32(allow_tf32_, grad_.scalar_type());
    const auto [need_x, need_w_up, need_b_up, need_w_down, need_b_down, need_gates] = output_mask;
    const bool need_z = need_x || need_w_up || need_b_up;

    const at::Tensor grad = grad_.contiguous();
    const at::Tensor compute_gates = cuda::compute_gates(gates, grad.scalar_type());
    const cuda::MappedRows grad_rows{grad, groups.by_token(top_k)};
    at::Tensor grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_gates, grad_z, gated_hidden;

    if (need_b_down) grad_b_down = cuda::bias_gradient(kOp, grad_rows, compute_gates, groups);
    if (need_z || need_w_down || need_gates) {
        const at::Tensor z = z_.contiguous();
        if (need_z) grad_z = kOverZ ? z : at::empty_like(z);
        if (need_gates) grad_gates = at::empty(gates.sizes(), compute_gates.options());
        const at::Tensor bias = has_value(b_down) ? b_down->contiguous() : at::Tensor();
        kernels::ActivationBackwardParams p;
        p.dtype = cuda::kernel_dtype(grad.scalar_type());
        p.activation = parse_activation_params(kOp, activation, glu_layout, alpha, limit);
        p.z = z.const_data_ptr();
        p.gates = compute_gates.const_data_ptr();
        p.slot_order = groups.slot_order.const_data_ptr<int32_t>();
        p.expert_offsets = groups.expert_offsets.const_data_ptr<int32_t>();
        p.num_experts = cuda::size_32(kOp, "the number of experts", groups.num_experts());
        p.grad_z = need_z ? grad_z.mutable_data_ptr() : nullptr;
        p.grad_gates = need_gates ? grad_gates.mutable_data_ptr() : nullptr;
        p.num_slots = groups.num_slots();
        p.width = w_down.size(2);
        p.grad = grad.const_data_ptr();
        p.bias = cuda::data_or_null(bias);
        p.top_k = cuda::size_32(kOp, "slot_position.size(1)", top_k);
        p.out_features = grad.size(1);
        gated_hidden = cuda::down_projection_backward(kOp, grad_rows, w_down, p, need_w_down, groups, allow_tf32);
        if (need_gates) grad_gates = cuda::to_dtype(grad_gates, gates.scalar_type());
    }

    cuda::MappedRows hidden_rows{std::move(gated_hidden), groups.grouped()};
    const cuda::MappedRows z_rows{grad_z, groups.grouped()};
    const cuda::MappedRows x_rows{need_w_up ? cuda::with_contiguous_rows(x) : x, groups.by_token(top_k)};
    using kernels::SumPlace;
    SumPlace place =
        kernels::place_of_sum(groups.num_slots(), groups.num_experts(), w_up.size(2), w_down.size(2), w_up.size(1));
    const auto combines = [&](bool needed, const cuda::MappedRows& left, const cuda::MappedRows& right,
                              const at::Tensor& weight) {
        return need_x && needed && cuda::combines_beside(kOp, left, right, weight, groups, allow_tf32);
    };
    if ((place == SumPlace::kBesideDownGradient && !combines(need_w_down, grad_rows, hidden_rows, w_down)) ||
        (place == SumPlace::kBesideUpGradient && !combines(need_w_up, z_rows, x_rows, w_up)) ||
        (place == SumPlace::kBehindDownGradient && !need_w_down)) {
        place = SumPlace::kAlone;
    }

    std::optional<cuda::SlotSum> sum;  // dL/dx, as long as it is not computed
    const auto make_sum = [&] {
        sum.emplace(kOp,
                    cuda::grouped_product(kOp, z_rows, {w_up, /*transposed=*/true}, /*bias=*/std::nullopt,
                                          groups.grouped(), groups, allow_tf32),
                    /*gates=*/at::Tensor(), slot_position, top_k, /*grouped=*/true);
        grad_x = sum->out();
    };
    const auto compute_sum = [&] {
        sum->launch();
        sum.reset();
    };
    const auto make_weight_gradient = [&](const cuda::MappedRows& left, const cuda::MappedRows& right,
                                          const at::Tensor& weight, bool behind_rows, bool beside_sum) {
        // In this order: the gradient must not be where something was that the rows are computed from.
        at::Tensor out = weight.is_contiguous() ? at::empty(weight.sizes(), weight.options()) : at::empty_like(weight);
        if (behind_rows) make_sum();
        cuda::weight_gradient(kOp, left, right, out, groups, allow_tf32, beside_sum ? &*sum : nullptr, behind_rows);
        if (beside_sum) sum.reset();
        return out;
    };
    const bool beside_down = need_x && place == SumPlace::kBesideDownGradient;
    const bool behind_down = need_x && place == SumPlace::kBehindDownGradient;
    const bool beside_up = need_x && place == SumPlace::kBesideUpGradient;
    if (need_w_down)
        grad_w_down = make_weight_gradient(grad_rows, hidden_rows, w_down, beside_down || behind_down, beside_down);
    hidden_rows.tensor.reset();
    if (behind_down) compute_sum();
    if (need_b_up) grad_b_up = cuda::bias_gradient(kOp, z_rows, /*gates=*/at::Tensor(), groups);
    if (need_x && place == SumPlace::kAlone) {
        make_sum();
        compute_sum();
    }
    if (need_w_up) grad_w_up = make_weight_gradient(z_rows, x_rows, w_up, beside_up, beside_up);
    return {or_empty(grad_x, grad),      or_empty(grad_w_up, grad),   or_empty(grad_b_up, grad),
            or_empty(grad_w_down, grad), or_empty(grad_b_down, grad), or_empty(grad_gates, grad)};
}

TORCH_LIBRARY_IMPL(scattermoe, CUDA, m) {
    m.impl("moe_mlp", TORCH_FN(moe_mlp_cuda));
    m.impl("_moe_mlp_forward", TORCH_FN(moe_mlp_forward_cuda));
    m.impl("_moe_mlp_backward", TORCH_FN(moe_mlp_backward_cuda<false>));
    m.impl("_moe_mlp_backward_over_z", TORCH_FN(moe_mlp_backward_cuda<true>));
}

}  // namespace

}  // namespace scattermoe
