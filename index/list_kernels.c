/* The portable versions, which say what is right. AVX2 takes them too: compilers turn the counting
 * into vectors, and what compresses its input has no instruction there. */
#include "index/list_kernels.h"

#include <stddef.h>

static uint32_t portable_below(const float *values, uint32_t count, float bound)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < count; i++)
        found += values[i] < bound;
    return found;
}

static uint32_t portable_nearest(const float *distance, const uint32_t *page, uint32_t count,
                                 uint32_t from, uint32_t to)
{
    uint32_t best = LIST_NONE;

    for (uint32_t i = 0; i < count; i++)
        if (page[i] - from < to - from && (best == LIST_NONE || distance[i] < distance[best]))
            best = i;
    return best;
}

static uint32_t portable_find(const uint32_t *values, uint32_t count, uint32_t value)
{
    for (uint32_t i = 0; i < count; i++)
        if (values[i] == value)
            return i;
    return LIST_NONE;
}

static void copy_row(const struct candidate_columns *columns, uint32_t from, uint32_t to)
{
    columns->distance[to] = columns->distance[from];
    columns->sharpness[to] = columns->sharpness[from];
    columns->position[to] = columns->position[from];
    columns->page[to] = columns->page[from];
}

static uint32_t portable_drop_page(const struct candidate_columns *columns, uint32_t count,
                                   uint32_t page)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < count; i++)
        if (columns->page[i] != page)
            copy_row(columns, i, kept++);
    return kept;
}

static uint32_t portable_drop_beyond(const struct candidate_columns *columns, uint32_t count,
                                     float bound, uint32_t ties)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < count; i++) {
        if (columns->distance[i] < bound) {
            copy_row(columns, i, kept++);
        } else if (columns->distance[i] == bound && ties) {
            copy_row(columns, i, kept++);
            ties--;
        }
    }
    return kept;
}

static uint64_t portable_shares(const float *distance, const float *sharpness, uint32_t count,
                                float bound, const uint32_t shares[SHARE_STEPS])
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < count; i++) {
        float step = (distance[i] - bound) * sharpness[i] * SHARE_STEPS_A_UNIT + SHARE_STEPS / 2;

        if (!(step < SHARE_STEPS))
            continue;
        sum += shares[step > 0 ? (uint32_t)step : 0];
    }
    return sum;
}

static const struct list_kernels scalar_kernels = {
    .name = "scalar",
    .below = portable_below,
    .nearest = portable_nearest,
    .find = portable_find,
    .drop_page = portable_drop_page,
    .drop_beyond = portable_drop_beyond,
    .shares = portable_shares,
};

const struct list_kernels *list_kernels_for(enum isa isa)
{
    if (!distance_kernels_for(isa))
        return NULL;
#if defined(__x86_64__)
    if (isa == ISA_AVX512 || isa == ISA_AVX512_VNNI)
        return &list_kernels_avx512;
#endif
    return &scalar_kernels;
}

const struct list_kernels *list_kernels_best(void)
{
    const struct distance_kernels *best = distance_kernels_best();

    for (int isa = ISA_COUNT - 1; isa > ISA_SCALAR; isa--)
        if (distance_kernels_for((enum isa)isa) == best)
            return list_kernels_for((enum isa)isa);
    return &scalar_kernels;
}
