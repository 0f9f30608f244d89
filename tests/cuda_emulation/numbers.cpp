// The arithmetic of the emulated device: 16-bit floats and the products of tensor cores.

#include "execution_model.h"

namespace capsule_kernels::cuda {

namespace emulation {

float from_float16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float x;
  if (exponent == 31) {
    x = mantissa != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    x = std::ldexp(float(mantissa), -24);
  } else {
    x = std::ldexp(float(1024 + mantissa), exponent - 25);
  }
  return bits >> 15 != 0 ? -x : x;
}

std::uint16_t to_float16(float x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  // The spacing of float16 values near x; nearbyint rounds to the nearest, ties to even.
  const float size = std::fabs(x);
  const int exponent = size >= std::ldexp(1.0f, -14) ? std::ilogb(size) : -14;
  const float units = std::isinf(x) ? INFINITY : std::nearbyint(std::ldexp(size, 10 - exponent));
  const float rounded = std::ldexp(units, exponent - 10);
  if (rounded >= 65520.0f) return sign | 0x7c00;
  if (rounded < std::ldexp(1.0f, -14)) return sign | std::uint16_t(std::ldexp(rounded, 24));
  const int e = std::ilogb(rounded);
  return sign | std::uint16_t((e + 15) << 10 | (int(std::ldexp(rounded, 10 - e)) - 1024));
}

}  // namespace emulation

void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  float operands[10];
  std::copy(c, c + 4, operands);
  std::memcpy(operands + 4, a, 16);
  std::memcpy(operands + 8, b, 8);
  emulation::join(emulation::Collective::kMma, operands, 10, [](emulation::Operands all) {
    // As the hardware: the low 13 bits are dropped, the sum is cut off (not rounded) to float32.
    const auto tf32 = [](float x) {
      unsigned bits;
      std::memcpy(&bits, &x, 4);
      bits &= 0xffffe000u;
      std::memcpy(&x, &bits, 4);
      return double(x);
    };
    double A[16][8], B[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int n = 0; n < 4; ++n) A[g + n % 2 * 8][q + n / 2 * 4] = tf32(all[lane][4 + n]);
      for (int n = 0; n < 2; ++n) B[q + n * 4][g] = tf32(all[lane][8 + n]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int n = 0; n < 4; ++n) {
        const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        double sum = all[lane][n];
        for (int k = 0; k < 8; ++k) sum += A[row][k] * B[k][column];
        float cut = float(sum);
        if (std::fabs(double(cut)) > std::fabs(sum)) cut = std::nextafter(cut, 0.0f);
        all[lane][n] = cut;
      }
    }
  });
  std::copy(operands, operands + 4, c);
}

}  // namespace capsule_kernels::cuda
