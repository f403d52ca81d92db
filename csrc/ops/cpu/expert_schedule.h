#pragma once

#include <ATen/ATen.h>

#include <functional>

#include "grouping.h"

namespace scattermoe::cpu {

// Memory of one thread for the intermediates of one expert at a time: reused from expert to expert, it stays in cache
// and is faulted in once.
class Scratch {
  public:
    explicit Scratch(at::TensorOptions options) : options_(options) {}

    // Makes room for `numel` elements and starts over.
    void reset(int64_t numel);
    // The next [rows, columns] of it.
    at::Tensor take(int64_t rows, int64_t columns);

  private:
    at::TensorOptions options_;
    at::Tensor buffer_;
    int64_t used_ = 0;
};

// Calls body(expert, scratch) once for every expert, empty ones too. Experts run side by side, one a thread, largest
// first; those so large that the threads would wait for them run before that, one after another, with every thread
// working inside their matrix products. The body runs below autograd and must write only what belongs to its expert.
void for_each_expert(const Grouping& grouping, const at::TensorOptions& scratch_options,
                     const std::function<void(int64_t expert, Scratch& scratch)>& body);

}  // namespace scattermoe::cpu
