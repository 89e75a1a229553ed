/* Random numbers that are the same on every machine: xoshiro256** seeded through splitmix64.
 * Blackman, Vigna, "Scrambled Linear Pseudorandom Number Generators", 2018.
 * A (seed, stream) pair names a sequence; parallel work takes one stream per unit of work, never
 * per thread, so results do not depend on the number of threads. */
#ifndef ANND_STORAGE_BASE_RANDOM_H
#define ANND_STORAGE_BASE_RANDOM_H

#include <stdint.h>

struct random {
    uint64_t state[4];
};

void random_init(struct random *random, uint64_t seed, uint64_t stream);
uint64_t random_u64(struct random *random);
/* Uniform in 0..bound-1, without modulo bias; bound >= 1. */
uint64_t random_below(struct random *random, uint64_t bound);
/* Uniform in [0, 1), 24 bits. */
float random_float(struct random *random);
/* Standard normal. Uses only + - * / and sqrt (a sum of twelve uniforms), so that the bytes do not
 * depend on the C library's log and cos. */
float random_normal(struct random *random);
/* Fisher-Yates over `count` numbers 0..count-1 written to out. */
void random_permutation(struct random *random, uint32_t *out, uint32_t count);

#endif
