#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_WEIGHT_GRAD(kPaired128x256, kLeft, kPlain);

}  // namespace scattermoe::kernels::sm90
