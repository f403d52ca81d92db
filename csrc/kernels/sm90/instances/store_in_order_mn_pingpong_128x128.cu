#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_GROUPED_GEMM(kPingPong128x128, kInOrder, kMn, kStore);

}  // namespace scattermoe::kernels::sm90
