#pragma once

// The grouped products on torch tensors, shared by parallel_linear and moe_mlp.

#include <ATen/ATen.h>

#include <optional>

#include "../../kernels/activation_kernels.h"
#include "../../kernels/combine.h"
#include "../../kernels/grouped_gemm.h"
#include "support.h"

namespace scattermoe::cuda {

// The part of a routing that products need; contiguous tensors.
struct Groups {
    at::Tensor slot_order;
    at::Tensor expert_offsets;

    Groups(const at::Tensor& order, const at::Tensor& offsets)
        : slot_order(order.contiguous()), expert_offsets(offsets.contiguous()) {}

    // A zero for one launch, on the device.
    int32_t* next_counter() const;

    // Whether a kernel was launched since the offsets were written: one of a product of these groups.
    bool offsets_are_old() const { return launched_; }
    void note_launch() const { launched_ = true; }

    int64_t num_slots() const { return slot_order.size(0); }
    int64_t num_experts() const { return expert_offsets.size(0) - 1; }

    kernels::RowMap grouped() const { return {}; }
    kernels::RowMap by_slot() const { return by_token(1); }
    kernels::RowMap by_token(int64_t top_k) const;

  private:
    mutable at::Tensor counters_;
    mutable int64_t used_counters_ = 0;
    mutable bool launched_ = false;
};

// A matrix whose rows belong to grouped positions through a map.
struct MappedRows {
    at::Tensor tensor;
    kernels::RowMap map;
};

// Weights [E, n, k], or [E, k, n] where they are transposed, with any strides. A view by transpose() would do, for the
// host time of an operator.
struct ProductWeight {
    const at::Tensor& tensor;
    bool transposed = false;

    int64_t n_dim() const { return transposed ? 2 : 1; }
    int64_t k_dim() const { return transposed ? 1 : 2; }
};

// out[position] = rows[position] weight[e]^T + bias[e], [S, n] with its rows through out_map; rows of sentinels are
// zero.
at::Tensor grouped_product(const char* op, const MappedRows& rows, const ProductWeight& weight,
                           const std::optional<at::Tensor>& bias, const kernels::RowMap& out_map, const Groups& groups,
                           bool allow_tf32);

struct UpProjection {
    at::Tensor hidden;  // [S, width]
    at::Tensor z;       // [S, n]; undefined where it was neither wanted nor needed on the way
};

// z = rows weight^T + bias and hidden = act(z), both in grouped order; rows of sentinels are act(0), which is zero.
UpProjection up_projection(const char* op, const MappedRows& rows, const ProductWeight& weight,
                           const std::optional<at::Tensor>& bias, int64_t width, const ActivationParams& activation,
                           const Groups& groups, bool allow_tf32, bool want_z);

// The backward through y = act(z) weight^T + bias, weight [E, H, width] with any strides, all in `activation` but its
// grad_hidden and gated_hidden. Returns gated_hidden [S, width]; it means nothing where it was not wanted.
at::Tensor down_projection_backward(const char* op, const MappedRows& grad_rows, const at::Tensor& weight,
                                    const kernels::ActivationBackwardParams& activation, bool want_gated_hidden,
                                    const Groups& groups, bool allow_tf32);

// y[t] = the sum of the rows of a token's slots times their gates; undefined gates are ones, and an undefined
// slot_position says that no slot is a sentinel (or that its row is zero). Made first and launched later, by itself or
// with a weight gradient.
class SlotSum {
  public:
    SlotSum(const char* op, const at::Tensor& rows, const at::Tensor& gates, const at::Tensor& slot_position,
            int64_t top_k, bool grouped);

    void launch() const;
    const at::Tensor& out() const { return out_; }
    const kernels::CombineParams& params() const { return params_; }

  private:
    const char* op_;
    at::Tensor rows_;
    at::Tensor gates_;
    at::Tensor positions_;
    at::Tensor out_;
    kernels::CombineParams params_;
};

// The same, at once.
at::Tensor combine_rows(const char* op, const at::Tensor& rows, const at::Tensor& gates,
                        const at::Tensor& slot_position, int64_t top_k, bool grouped);

// out[e] = sum over the positions of e of left[position]^T right[position], into a tensor [E, m, n] of any strides; and
// a sum that was made but not launched. operands_are_old: a product was launched since left and right were written and
// out was made.
void weight_gradient(const char* op, const MappedRows& left, const MappedRows& right, const at::Tensor& out,
                     const Groups& groups, bool allow_tf32, const SlotSum* beside = nullptr,
                     bool operands_are_old = false);

// Whether a gradient of weights like `weight` is computed by a kernel that takes a sum along; left and right have
// contiguous rows.
bool combines_beside(const char* op, const MappedRows& left, const MappedRows& right, const at::Tensor& weight,
                     const Groups& groups, bool allow_tf32);

// [E, n]: the sum over the positions of e of gate * rows[position]; gates [T, K] in the compute dtype, or undefined.
at::Tensor bias_gradient(const char* op, const MappedRows& rows, const at::Tensor& gates, const Groups& groups);

}  // namespace scattermoe::cuda
