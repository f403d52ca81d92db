#pragma once

#include <bit>
#include <cstdint>

#include "types.h"

namespace scattermoe::kernels {

// Division of 0 <= n < 2^31 by a divisor known at launch: a multiplication and a shift in place of some twenty
// instructions. With p = 31 + ceil(log2(d)) and m = ceil(2^p / d), floor(n / d) == (n * m) >> p for every such n
// (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994), and m fits 32 bits.
struct FastDivider {
    uint32_t multiplier = 0;
    uint32_t shift = 0;  // p - 32; a divisor of one, whose p - 32 would be negative, divides without it
    int32_t divisor = 1;

    FastDivider() = default;
    explicit constexpr FastDivider(int32_t d) : divisor(d) {
        if (d <= 1) return;
        const int p = 31 + std::bit_width(static_cast<uint32_t>(d - 1));
        multiplier = static_cast<uint32_t>(((uint64_t{1} << p) + d - 1) / d);
        shift = static_cast<uint32_t>(p - 32);
    }

    SCATTERMOE_HD constexpr int32_t divide(int32_t n) const {
        if (divisor == 1) return n;
        return static_cast<int32_t>(static_cast<uint32_t>((uint64_t{static_cast<uint32_t>(n)} * multiplier) >> 32) >>
                                    shift);
    }
};

static_assert(FastDivider(7).divide(2147483647) == 2147483647 / 7 && FastDivider(10).divide(99) == 9);
static_assert(FastDivider(1).divide(5) == 5 && FastDivider(8).divide(63) == 7 &&
              FastDivider(2147483647).divide(2147483646) == 0);

}  // namespace scattermoe::kernels
