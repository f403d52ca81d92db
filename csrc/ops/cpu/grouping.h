#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace scattermoe::cpu {

// The routing as the CPU kernels read it. Construction checks the values, so a routing made by hand fails with an
// IndexError instead of reading out of bounds; the device kernels cannot afford that.
class Grouping {
  public:
    Grouping(const char* op, const at::Tensor& slot_order, const at::Tensor& expert_offsets);

    int64_t num_experts() const { return expert_offsets_.size(0) - 1; }
    int64_t num_slots() const { return slot_order_.size(0); }
    // Slots that are in a group; the grouped positions from here on belong to sentinels.
    int64_t num_rows() const { return begin(num_experts()); }
    int64_t begin(int64_t expert) const { return expert_offsets_.const_data_ptr<int32_t>()[expert]; }
    int64_t end(int64_t expert) const { return begin(expert + 1); }
    // The slots at grouped positions [position, ...).
    const int32_t* slots(int64_t position) const { return slot_order_.const_data_ptr<int32_t>() + position; }

  private:
    at::Tensor slot_order_;
    at::Tensor expert_offsets_;
};

// slot_position, checked likewise: values in [-1, num_slots).
at::Tensor checked_slot_position(const char* op, const at::Tensor& slot_position);

}  // namespace scattermoe::cpu
