#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

namespace scattermoe::kernels {

// What launches need to know of a device.
struct DeviceFacts {
    int device;
    // The architecture that the code loaded on it was compiled for: 90 for sm_90 machine code, 120 also on a newer chip
    // that translates the PTX of compute_120. Kernels are compiled differently for different architectures, so their
    // launch follows this and not the chip.
    int code_architecture;
    int multiprocessors;
};

// Of the current device. The driver is asked once.
cudaError_t current_device(DeviceFacts& facts);

// Does something to a device, which is the current one, the first time it is asked to: what a launch needs once costs
// host time each time. Threads that come at the same time may do it twice.
class OncePerDevice {
  public:
    template <typename F>
    cudaError_t run(int device, F&& f) {
        const bool remembered = device < static_cast<int>(done_.size());
        if (remembered && done_[device].load(std::memory_order_acquire)) return cudaSuccess;
        const cudaError_t error = f();
        if (remembered && error == cudaSuccess) done_[device].store(true, std::memory_order_release);
        return error;
    }

  private:
    std::array<std::atomic<bool>, 64> done_{};
};

}  // namespace scattermoe::kernels
