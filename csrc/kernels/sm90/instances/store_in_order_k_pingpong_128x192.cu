#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_GROUPED_GEMM(kPingPong128x192, kInOrder, kK, kStore);

}  // namespace scattermoe::kernels::sm90
