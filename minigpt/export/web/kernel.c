// The inner products of the browser engine (model.js), with WebAssembly's 128-bit vectors. Build, in this folder:
//   clang --target=wasm32 -O2 -msimd128 -ffreestanding -nostdlib -Wl,--no-entry,--import-memory,--strip-all -o kernel.wasm kernel.c
// Pointers are offsets into the memory that model.js creates. No function uses static data or the stack.
#include <stdint.h>
#include <wasm_simd128.h>

#define EXPORT(name) __attribute__((export_name(#name))) void name

// Columns after which integer sums become floats: each lane then holds 2048 / 8 sums of two products, each at most
// 127 x 32767, which stays below 2^31.
#define BLOCK 2048

static inline float sum(v128_t v) {
  return wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1) + wasm_f32x4_extract_lane(v, 2) +
         wasm_f32x4_extract_lane(v, 3);
}

static inline float dot_f32(const float *x, const float *w, int columns) {
  v128_t a0 = wasm_f32x4_splat(0), a1 = a0, a2 = a0, a3 = a0;
  int c = 0;
  for (; c + 16 <= columns; c += 16) {
    a0 = wasm_f32x4_add(a0, wasm_f32x4_mul(wasm_v128_load(x + c), wasm_v128_load(w + c)));
    a1 = wasm_f32x4_add(a1, wasm_f32x4_mul(wasm_v128_load(x + c + 4), wasm_v128_load(w + c + 4)));
    a2 = wasm_f32x4_add(a2, wasm_f32x4_mul(wasm_v128_load(x + c + 8), wasm_v128_load(w + c + 8)));
    a3 = wasm_f32x4_add(a3, wasm_f32x4_mul(wasm_v128_load(x + c + 12), wasm_v128_load(w + c + 12)));
  }
  float total = sum(wasm_f32x4_add(wasm_f32x4_add(a0, a1), wasm_f32x4_add(a2, a3)));
  for (; c < columns; c++) total += x[c] * w[c];
  return total;
}

static inline float dot_i8(const int16_t *x, const int8_t *w, int columns) {
  float total = 0;
  for (int c = 0; c < columns;) {
    int end = c + BLOCK < columns ? c + BLOCK : columns;
    v128_t a0 = wasm_i32x4_splat(0), a1 = a0;
    for (; c + 16 <= end; c += 16) {
      v128_t weights = wasm_v128_load(w + c);
      a0 = wasm_i32x4_add(a0, wasm_i32x4_dot_i16x8(wasm_i16x8_extend_low_i8x16(weights), wasm_v128_load(x + c)));
      a1 = wasm_i32x4_add(a1, wasm_i32x4_dot_i16x8(wasm_i16x8_extend_high_i8x16(weights), wasm_v128_load(x + c + 8)));
    }
    total += sum(wasm_f32x4_add(wasm_f32x4_convert_i32x4(a0), wasm_f32x4_convert_i32x4(a1)));
    for (; c < end; c++) total += x[c] * w[c];
  }
  return total;
}

// out[i, r] = x[i] . w[r] + bias[r] for n vectors of `columns` numbers; out is [n, rows]. bias may be 0: none.
// Row after row, as they lie in memory: reading several rows at once took nearly twice the time.
EXPORT(matmul_f32)(float *out, const float *x, const float *w, const float *bias, int rows, int columns, int n) {
  for (int r = 0; r < rows; r++) {
    for (int i = 0; i < n; i++) out[i * rows + r] = dot_f32(x + i * columns, w + r * columns, columns) + (bias ? bias[r] : 0);
  }
}

// The same for int8 rows with one scale each. x is first rounded to 16 bits, each vector with a scale of its own, in
// `scratch`: n floats, then n * columns 16-bit integers.
EXPORT(matmul_i8)(float *out, const float *x, const int8_t *w, const float *scales, const float *bias, int rows,
                  int columns, int n, float *scratch) {
  int16_t *rounded = (int16_t *)(scratch + n);
  for (int i = 0; i < n; i++) {
    float largest = 0;
    for (int c = 0; c < columns; c++) {
      float size = __builtin_fabsf(x[i * columns + c]);
      if (size > largest) largest = size;
    }
    scratch[i] = largest / 32766.5f;
    float inverse = largest > 0 ? 32766.5f / largest : 0; // rounding never gives more than 32767
    for (int c = 0; c < columns; c++) rounded[i * columns + c] = (int16_t)__builtin_rintf(x[i * columns + c] * inverse);
  }
  for (int r = 0; r < rows; r++) {
    for (int i = 0; i < n; i++) {
      float product = dot_i8(rounded + i * columns, w + r * columns, columns);
      out[i * rows + r] = product * scratch[i] * scales[r] + (bias ? bias[r] : 0);
    }
  }
}

// out = sum over the rows of v [rows, columns], each times its weight.
EXPORT(weighted_sum)(float *out, const float *weights, const float *v, int rows, int columns) {
  int c = 0;
  for (; c + 16 <= columns; c += 16) {
    v128_t a0 = wasm_f32x4_splat(0), a1 = a0, a2 = a0, a3 = a0;
    for (int r = 0; r < rows; r++) {
      const float *row = v + r * columns + c;
      v128_t weight = wasm_v128_load32_splat(weights + r);
      a0 = wasm_f32x4_add(a0, wasm_f32x4_mul(weight, wasm_v128_load(row)));
      a1 = wasm_f32x4_add(a1, wasm_f32x4_mul(weight, wasm_v128_load(row + 4)));
      a2 = wasm_f32x4_add(a2, wasm_f32x4_mul(weight, wasm_v128_load(row + 8)));
      a3 = wasm_f32x4_add(a3, wasm_f32x4_mul(weight, wasm_v128_load(row + 12)));
    }
    wasm_v128_store(out + c, a0);
    wasm_v128_store(out + c + 4, a1);
    wasm_v128_store(out + c + 8, a2);
    wasm_v128_store(out + c + 12, a3);
  }
  for (; c < columns; c++) {
    float total = 0;
    for (int r = 0; r < rows; r++) total += weights[r] * v[r * columns + c];
    out[c] = total;
  }
}
