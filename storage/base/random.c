/* xoshiro256** 1.0 by Blackman and Vigna. The four words of state come from splitmix64, whose
 * starting point mixes seed and stream: two streams of one seed must not start a step or two apart
 * on the same splitmix64 sequence, or they would share words of state. */
#include "storage/base/random.h"

#include <assert.h>

static uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);

    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static uint64_t rotate_left(uint64_t value, int bits)
{
    return (value << bits) | (value >> (64 - bits));
}

void random_init(struct random *random, uint64_t seed, uint64_t stream)
{
    uint64_t state;

    state = splitmix64(&seed) ^ stream;
    state = splitmix64(&state);
    /* Four successive outputs of a bijection of distinct states: never all zero. */
    for (int i = 0; i < 4; i++)
        random->state[i] = splitmix64(&state);
}

uint64_t random_u64(struct random *random)
{
    uint64_t *s = random->state;
    uint64_t result = rotate_left(s[1] * 5, 7) * 9;
    uint64_t t = s[1] << 17;

    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

/* Lemire, "Fast Random Integer Generation in an Interval", 2019: the high half of a product, with
 * the few low halves that would favour some numbers drawn again. */
uint64_t random_below(struct random *random, uint64_t bound)
{
    unsigned __int128 product;
    uint64_t threshold;

    assert(bound >= 1);
    product = (unsigned __int128)random_u64(random) * bound;
    if ((uint64_t)product < bound) {
        threshold = (0 - bound) % bound;
        while ((uint64_t)product < threshold)
            product = (unsigned __int128)random_u64(random) * bound;
    }
    return (uint64_t)(product >> 64);
}

float random_float(struct random *random)
{
    return (float)(random_u64(random) >> 40) * 0x1p-24f;
}

/* The sum of twelve 24-bit integers has mean 6 * (2^24 - 1) and, over 2^24, variance 1. Summed as
 * integers and scaled once, so no compiler's order of additions can change a bit. */
float random_normal(struct random *random)
{
    int64_t sum = 0;

    for (int i = 0; i < 6; i++) {
        uint64_t bits = random_u64(random);

        sum += (int64_t)(bits >> 40) + (int64_t)((bits >> 16) & 0xFFFFFFu);
    }
    sum -= 6 * ((INT64_C(1) << 24) - 1);
    return (float)((double)sum * 0x1p-24);
}

void random_permutation(struct random *random, uint32_t *out, uint32_t count)
{
    /* Inside-out: place i at a random place among 0..i, moving what was there to i. */
    for (uint32_t i = 0; i < count; i++) {
        uint32_t j = (uint32_t)random_below(random, (uint64_t)i + 1);

        if (j != i)
            out[i] = out[j];
        out[j] = i;
    }
}
