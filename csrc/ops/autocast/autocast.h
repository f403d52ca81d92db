#pragma once

#include <ATen/autocast_mode.h>

#include <optional>

#include "../checks.h"

namespace scattermoe {

// Casts arguments as `linear` does under autocast: floating ones to autocast's dtype, float64 left alone. While it
// lives, autocast itself is off, so the op it wraps is called only once more.
class AutocastScope {
  public:
    explicit AutocastScope(at::DeviceType device_type)
        : device_type_(device_type), dtype_(at::autocast::get_autocast_dtype(device_type)) {}

    at::Tensor cast(const at::Tensor& tensor) const { return at::autocast::cached_cast(dtype_, tensor, device_type_); }

    std::optional<at::Tensor> cast(const std::optional<at::Tensor>& tensor) const {
        return has_value(tensor) ? std::optional<at::Tensor>(cast(*tensor)) : std::nullopt;
    }

  private:
    c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
    at::DeviceType device_type_;
    at::ScalarType dtype_;
};

}  // namespace scattermoe
