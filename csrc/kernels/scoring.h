#pragma once

namespace scattermoe {

// How a router's logits become scores.
enum class Scoring : int { kSoftmax, kSigmoid };

// Added to the sum of a token's gates before dividing by it: an all-zero row stays zero. No effect on any other float32
// sum.
inline constexpr double kNormalizeEpsilon = 1e-20;

}  // namespace scattermoe
