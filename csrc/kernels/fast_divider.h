#pragma once

#include <bit>
#include <cstdint>

#include "types.h"

namespace scattermoe::kernels {

// Division of 0 <= n < 2^31 by a divisor known at launch: a multiplication and shifts in place of some twenty
// instructions, and no branch. With l = ceil(log2(d)) and m = ceil(2^(31 + l) / d), which fits 32 bits, floor(n / d) ==
// (n * m) >> (31 + l) for every such n (Granlund and Montgomery, "Division by Invariant Integers using Multiplication",
// 1994).
struct FastDivider {
    uint32_t multiplier = uint32_t{1} << 31;  // divides by one
    uint32_t shift = 0;

    FastDivider() = default;
    explicit constexpr FastDivider(int32_t divisor) {
        shift = std::bit_width(static_cast<uint32_t>(divisor - 1));
        multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
    }

    SCATTERMOE_HD constexpr int32_t divide(int32_t n) const {
        const uint64_t product = uint64_t{2 * static_cast<uint32_t>(n)} * multiplier;
        return static_cast<int32_t>(static_cast<uint32_t>(product >> 32) >> shift);
    }
};

static_assert(FastDivider(7).divide(2147483647) == 2147483647 / 7 && FastDivider(10).divide(99) == 9);
static_assert(FastDivider(1).divide(5) == 5 && FastDivider(8).divide(63) == 7 &&
              FastDivider(2147483647).divide(2147483646) == 0);

}  // namespace scattermoe::kernels
