#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_WEIGHT_GRAD(kPaired128x256, kLeft, kBesideSum);

}  // namespace scattermoe::kernels::sm90
