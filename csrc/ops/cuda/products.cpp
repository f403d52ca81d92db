#include "products.h"

#include "../../kernels/bias_grad.h"
#include "../../kernels/down_projection.h"
#include "../../kernels/up_projection.h"

namespace scattermoe::cuda {

kernels::RowMap Groups::by_token(int64_t top_k) const {
    return {slot_order.const_data_ptr<int32_t>(), kernels::FastDivider(static_cast<int32_t>(top_k))};
}

int32_t* Groups::next_counter() const {
    constexpr int64_t kCounters = 4;
    if (!counters_.defined() || used_counters_ == counters_.size(0)) {
        counters_ = at::empty({kCounters}, slot_order.options());
        check_launch("counters", cudaMemsetAsync(counters_.mutable_data_ptr(), 0, counters_.nbytes(), current_stream()),
                     {});
        used_counters_ = 0;
    }
    return counters_.data_ptr<int32_t>() + used_counters_++;
}

namespace {

// A product's parameters but for its output, and the tensors that they point into.
struct Product {
    at::Tensor in;
    at::Tensor weight;
    at::Tensor bias;
    kernels::GroupedGemmParams params;
};

Product make_product(const char* op, const MappedRows& rows, const ProductWeight& weight,
                     const std::optional<at::Tensor>& bias, const Groups& groups, bool allow_tf32) {
    const int64_t n_dim = weight.n_dim(), k_dim = weight.k_dim();
    // A dimension of one element is contiguous whatever its stride says.
    const auto contiguous_along = [](const at::Tensor& t, int64_t dim) {
        return t.stride(dim) == 1 || t.size(dim) <= 1;
    };
    const auto readable = [&](const at::Tensor& t) {
        return contiguous_along(t, k_dim)   ? stride_fits(t, t.stride(n_dim))
               : contiguous_along(t, n_dim) ? stride_fits(t, t.stride(k_dim))
                                            : false;
    };
    Product product;
    product.in = with_contiguous_rows(rows.tensor);
    product.weight = readable(weight.tensor) ? weight.tensor : weight.tensor.contiguous();
    if (has_value(bias)) product.bias = bias->contiguous();
    const at::Tensor& w = product.weight;
    const bool k_contiguous = contiguous_along(w, k_dim);
    kernels::GroupedGemmParams& p = product.params;
    p.dtype = kernel_dtype(product.in.scalar_type());
    p.allow_tf32 = allow_tf32;
    p.in = product.in.const_data_ptr();
    p.in_stride = row_stride(product.in);
    p.in_rows = rows.map;
    p.weight = w.const_data_ptr();
    p.weight_expert_stride = w.stride(0);
    p.weight_n_stride = k_contiguous ? w.stride(n_dim) : 1;
    p.weight_k_stride = k_contiguous ? 1 : w.stride(k_dim);
    p.bias = data_or_null(product.bias);
    p.out_stride = w.size(n_dim);
    p.expert_offsets = groups.expert_offsets.const_data_ptr<int32_t>();
    p.num_experts = size_32(op, "the number of experts", groups.num_experts());
    p.num_slots = size_32(op, "the number of slots", groups.num_slots());
    p.n = size_32(op, "the columns of a product", w.size(n_dim));
    p.k = size_32(op, "the columns of a product's rows", w.size(k_dim));
    if (kernels::counts_tiles(p)) p.tile_counter = groups.next_counter();
    return product;
}

}  // namespace

at::Tensor grouped_product(const char* op, const MappedRows& rows, const ProductWeight& weight,
                           const std::optional<at::Tensor>& bias, const kernels::RowMap& out_map, const Groups& groups,
                           bool allow_tf32) {
    Product product = make_product(op, rows, weight, bias, groups, allow_tf32);
    at::Tensor out = at::empty({groups.num_slots(), product.params.n}, product.in.options());
    product.params.out = out.mutable_data_ptr();
    product.params.out_rows = out_map;
    check_launch(op, kernels::grouped_gemm(product.params, current_stream()),
                 {{"rows", product.in}, {"weight", product.weight}, {"out", out}});
    groups.note_launch();
    return out;
}

UpProjection up_projection(const char* op, const MappedRows& rows, const ProductWeight& weight,
                           const std::optional<at::Tensor>& bias, int64_t width, const ActivationParams& activation,
                           const Groups& groups, bool allow_tf32, bool want_z) {
    const Product product = make_product(op, rows, weight, bias, groups, allow_tf32);
    UpProjection result;
    result.hidden = at::empty({groups.num_slots(), width}, product.in.options());
    kernels::UpProjectionParams p{product.params, activation, result.hidden.mutable_data_ptr()};
    const bool fused = kernels::up_projection_is_fused(p);
    if (want_z || !fused) {
        result.z = at::empty({groups.num_slots(), product.params.n}, product.in.options());
        p.gemm.out = result.z.mutable_data_ptr();
    }
    check_launch(op, kernels::up_projection(p, fused, current_stream()),
                 {{"rows", product.in}, {"weight", product.weight}, {"hidden", result.hidden}});
    groups.note_launch();
    return result;
}

at::Tensor down_projection_backward(const char* op, const MappedRows& grad_rows, const at::Tensor& weight,
                                    const kernels::ActivationBackwardParams& activation, bool want_gated_hidden,
                                    const Groups& groups, bool allow_tf32) {
    const Product product =
        make_product(op, grad_rows, {weight, /*transposed=*/true}, /*bias=*/std::nullopt, groups, allow_tf32);
    kernels::DownProjectionBackwardParams p{product.params, activation};
    const bool fused = kernels::down_projection_backward_is_fused(p);
    at::Tensor hidden, partials;
    if (want_gated_hidden || !fused) {
        hidden = at::empty({groups.num_slots(), product.params.n}, product.in.options());
        if (!fused) p.gemm.out = hidden.mutable_data_ptr();
        // g A takes the place of dA', element by element.
        if (want_gated_hidden) p.activation.gated_hidden = hidden.mutable_data_ptr();
    }
    if (const int32_t parts = kernels::gate_parts(p, fused); parts > 0) {
        partials = at::empty({parts, groups.num_slots()}, product.in.options().dtype(at::kFloat));
        p.gate_partials = partials.mutable_data_ptr<float>();
    }
    check_launch(op, kernels::down_projection_backward(p, fused, current_stream()),
                 {{"grad", product.in}, {"w_down", product.weight}});
    groups.note_launch();
    return hidden;
}

SlotSum::SlotSum(const char* op, const at::Tensor& rows, const at::Tensor& gates, const at::Tensor& slot_position,
                 int64_t top_k, bool grouped)
    : op_(op),
      rows_(rows.contiguous()),
      gates_(gates),
      positions_(slot_position.defined() ? slot_position.contiguous() : at::Tensor()),
      out_(at::empty({rows.size(0) / top_k, rows.size(1)}, rows.options())) {
    params_.dtype = kernel_dtype(rows.scalar_type());
    params_.rows = rows_.const_data_ptr();
    params_.gates = data_or_null(gates_);
    params_.slot_position = static_cast<const int32_t*>(data_or_null(positions_));
    params_.grouped = grouped;
    params_.out = out_.mutable_data_ptr();
    params_.num_tokens = out_.size(0);
    params_.top_k = size_32(op, "top_k", top_k);
    params_.hidden = out_.size(1);
}

void SlotSum::launch() const {
    check_launch(op_, kernels::combine(params_, current_stream()), {{"rows", rows_}, {"gates", gates_}});
}

at::Tensor combine_rows(const char* op, const at::Tensor& rows, const at::Tensor& gates,
                        const at::Tensor& slot_position, int64_t top_k, bool grouped) {
    const SlotSum sum(op, rows, gates, slot_position, top_k, grouped);
    sum.launch();
    return sum.out();
}

namespace {

// A weight gradient's parameters but for its output's place, which has the strides of `out`; left and right have
// contiguous rows.
kernels::WeightGradParams weight_grad_params(const char* op, const MappedRows& left, const MappedRows& right,
                                             const at::Tensor& out, const Groups& groups, bool allow_tf32) {
    kernels::WeightGradParams p;
    p.dtype = kernel_dtype(out.scalar_type());
    p.allow_tf32 = allow_tf32;
    p.left = left.tensor.const_data_ptr();
    p.left_stride = row_stride(left.tensor);
    p.left_rows = left.map;
    p.right = right.tensor.const_data_ptr();
    p.right_stride = row_stride(right.tensor);
    p.right_rows = right.map;
    p.out_expert_stride = out.stride(0);
    p.out_stride = out.stride(1);
    p.expert_offsets = groups.expert_offsets.const_data_ptr<int32_t>();
    p.num_experts = size_32(op, "the number of experts", groups.num_experts());
    p.num_slots = size_32(op, "the number of slots", groups.num_slots());
    p.m = size_32(op, "weight.size(1)", out.size(1));
    p.n = size_32(op, "weight.size(2)", out.size(2));
    return p;
}

// Whether a row of a gradient lies in memory as the products write it.
bool has_adjacent_columns(const at::Tensor& weight) {
    return weight.stride(2) == 1 || weight.size(2) <= 1;
}

}  // namespace

bool combines_beside(const char* op, const MappedRows& left, const MappedRows& right, const at::Tensor& weight,
                     const Groups& groups, bool allow_tf32) {
    if (!has_adjacent_columns(weight)) {
        const at::Tensor transposed = weight.transpose(1, 2);
        return has_adjacent_columns(transposed) && combines_beside(op, right, left, transposed, groups, allow_tf32);
    }
    return kernels::combines_beside(weight_grad_params(op, left, right, weight, groups, allow_tf32));
}

void weight_gradient(const char* op, const MappedRows& left, const MappedRows& right, const at::Tensor& out,
                     const Groups& groups, bool allow_tf32, const SlotSum* beside, bool operands_are_old) {
    if (out.numel() == 0) {
        if (beside != nullptr) beside->launch();
        return;
    }
    if (!has_adjacent_columns(out)) {
        if (out.stride(1) == 1 || out.size(1) <= 1) {
            // The transposed product has its rows where out has its columns.
            weight_gradient(op, right, left, out.transpose(1, 2), groups, allow_tf32, beside, operands_are_old);
        } else {
            const at::Tensor contiguous = at::empty(out.sizes(), out.options());
            weight_gradient(op, left, right, contiguous, groups, allow_tf32, beside);
            out.copy_(contiguous);
        }
        return;
    }
    const MappedRows l{with_contiguous_rows(left.tensor), left.map}, r{with_contiguous_rows(right.tensor), right.map};
    kernels::WeightGradParams p = weight_grad_params(op, l, r, out, groups, allow_tf32);
    p.out = out.mutable_data_ptr();
    p.offsets_are_old = groups.offsets_are_old();
    p.operands_are_old =
        operands_are_old && p.offsets_are_old && l.tensor.is_same(left.tensor) && r.tensor.is_same(right.tensor);
    if (beside != nullptr) p.beside = &beside->params();
    if (kernels::counts_tiles(p)) p.tile_counter = groups.next_counter();
    check_launch(op, kernels::weight_grad(p, current_stream()),
                 {{"left", l.tensor}, {"right", r.tensor}, {"out", out}});
}

at::Tensor bias_gradient(const char* op, const MappedRows& rows, const at::Tensor& gates, const Groups& groups) {
    const at::Tensor grad = with_contiguous_rows(rows.tensor);
    at::Tensor out = at::empty({groups.num_experts(), grad.size(1)}, grad.options());
    kernels::BiasGradParams p;
    p.dtype = kernel_dtype(grad.scalar_type());
    p.grad = grad.const_data_ptr();
    p.grad_stride = row_stride(grad);
    p.grad_rows = rows.map;
    p.gates = data_or_null(gates);
    p.slot_order = groups.slot_order.const_data_ptr<int32_t>();
    p.expert_offsets = groups.expert_offsets.const_data_ptr<int32_t>();
    p.num_experts = size_32(op, "the number of experts", groups.num_experts());
    p.num_slots = size_32(op, "the number of slots", groups.num_slots());
    p.n = size_32(op, "grad.size(1)", grad.size(1));
    p.out = out.mutable_data_ptr();
    const at::Tensor workspace = at::empty({kernels::bias_grad_workspace(p.dtype, p.num_experts, p.num_slots, p.n)},
                                           grad.options().dtype(at::kByte));
    p.workspace = workspace.mutable_data_ptr();
    check_launch(op, kernels::bias_grad(p, current_stream()), {{"grad", grad}, {"out", out}});
    return out;
}

}  // namespace scattermoe::cuda
