// One step of the recursion of generalised advantage estimation, from a sequence's end. No torch, no CUDA header.
//
//     delta_t = r_t + gamma V_p - V_t       A_t = delta_t + gamma lam A_p       R_t = A_t + V_t
//
// p is the position after t that takes part ("carry": the next trainable token; "decay": the next token, where r and V
// count as 0 if it is not trainable). Behind the last one V_p is 0 or given, A_p is 0.
#pragma once

#include "host_device.h"

namespace rlhf {

RLHF_FN float td_error(float reward, float value, float next_value, float gamma) {
  return (reward + gamma * next_value) - value;
}

RLHF_FN float advance(float delta, float decay, float next_advantage) { return delta + decay * next_advantage; }

}  // namespace rlhf
