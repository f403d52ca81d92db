#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

namespace scattermoe::kernels {

// Does something to the current device the first time it is asked to: what a launch needs once costs host time each
// time. Threads that come at the same time may do it twice.
class OncePerDevice {
  public:
    template <typename F>
    cudaError_t run(F&& f) {
        int device = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error != cudaSuccess) return error;
        const bool remembered = device < static_cast<int>(done_.size());
        if (remembered && done_[device].load(std::memory_order_acquire)) return cudaSuccess;
        error = f();
        if (remembered && error == cudaSuccess) done_[device].store(true, std::memory_order_release);
        return error;
    }

  private:
    std::array<std::atomic<bool>, 64> done_{};
};

// The architecture that the code loaded on the current device was compiled for: 90 for sm_90 machine code, 120 also on
// a newer chip that translates the PTX of compute_120. Kernels are compiled differently for different architectures, so
// their launch follows this and not the chip.
cudaError_t code_architecture(int& arch);

}  // namespace scattermoe::kernels
