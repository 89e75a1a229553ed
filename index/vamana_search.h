/* vamana_search: greedy search of a graph over vectors in memory (the paper's algorithm 1).
 *
 * Used by the build, by the repair of connectivity and by tests; searches of segments on disk are
 * disk_search's. Also home of the row distance that the build's parts share. */
#ifndef ANND_INDEX_VAMANA_SEARCH_H
#define ANND_INDEX_VAMANA_SEARCH_H

#include <stddef.h>
#include <stdint.h>

#include "index/candidates.h"
#include "index/distance.h"
#include "index/vamana.h"

/* Vectors with the kernel for their type: copied out of a vector_matrix, borrowed data. */
struct row_space {
    const uint8_t *data;
    uint64_t row_bytes;
    uint64_t vector_bytes;
    uint32_t count;
    uint32_t dim;
    enum element_type type;
    const struct distance_kernels *kernels;
};

/* ERR_INVALID: no rows, no dimensions or too many, rows shorter than a vector, a type other than
 * f32, f16, u8, i8. */
int row_space_init(struct row_space *space, const struct vector_matrix *vectors, struct error *err);

static inline const uint8_t *row_space_row(const struct row_space *space, uint32_t row)
{
    return space->data + (uint64_t)row * space->row_bytes;
}

/* Squared L2. Rows of f32 and f16 have to be aligned to their element. */
static inline float row_space_distance(const struct row_space *space, const void *a, const void *b)
{
    switch (space->type) {
    case ELEMENT_U8:
        return (float)space->kernels->l2_u8(a, b, space->dim);
    case ELEMENT_I8:
        return (float)space->kernels->l2_i8(a, b, space->dim);
    case ELEMENT_F16:
        return space->kernels->l2_f16(a, b, space->dim);
    default:
        return space->kernels->l2_f32(a, b, space->dim);
    }
}

/* The same from a vector of floats, and the inner product of floats with a row. */
static inline float row_space_float_distance(const struct row_space *space, const float *query,
                                             const void *row)
{
    switch (space->type) {
    case ELEMENT_U8:
        return space->kernels->l2_f32_u8(query, row, space->dim);
    case ELEMENT_I8:
        return space->kernels->l2_f32_i8(query, row, space->dim);
    case ELEMENT_F16:
        return space->kernels->l2_f32_f16(query, row, space->dim);
    default:
        return space->kernels->l2_f32(query, row, space->dim);
    }
}

static inline float row_space_float_product(const struct row_space *space, const float *query,
                                            const void *row)
{
    switch (space->type) {
    case ELEMENT_U8:
        return space->kernels->ip_f32_u8(query, row, space->dim);
    case ELEMENT_I8:
        return space->kernels->ip_f32_i8(query, row, space->dim);
    case ELEMENT_F16:
        return space->kernels->ip_f32_f16(query, row, space->dim);
    default:
        return space->kernels->ip_f32(query, row, space->dim);
    }
}

/* The row as floats: itself, or converted into `buffer` (dim floats). */
const float *row_space_floats(const struct row_space *space, uint32_t row, float *buffer);

/* Asks for the first lines of a row; the hardware follows up on the rest of a long one. */
static inline void row_space_prefetch(const struct row_space *space, uint32_t row)
{
    const uint8_t *at = row_space_row(space, row);
    uint64_t bytes = space->vector_bytes < 512 ? space->vector_bytes : 512;

    for (uint64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(at + i);
    __builtin_prefetch(at + bytes - 1);
}

/* One thread's scratch; after a search also its answer. */
struct search_scratch {
    struct candidates list; /* the list_size nearest found */
    struct visited visited;
    uint32_t *fresh;            /* neighbours of one node not seen before */
    struct candidate *expanded; /* every node the search went through, no particular order */
    uint32_t expanded_count;
    uint32_t expanded_limit; /* beyond it the latest take the places of the earliest */
};

/* For lists up to list_size on graphs up to max_degree. ERR_NOMEM. */
int search_scratch_init(struct search_scratch *scratch, uint32_t list_size, uint32_t max_degree,
                        struct error *err);
void search_scratch_release(struct search_scratch *scratch);
/* Bytes search_scratch_init() takes. */
uint64_t search_scratch_memory_bytes(uint32_t list_size, uint32_t max_degree);

/* Walks from graph->entry_point towards query (an element vector like the rows), expanding the
 * nearest open candidate until all of the list_size nearest are expanded. No allocation; the graph
 * must not change under it, except for rows no edge leads to. */
void vamana_search_run(const struct row_space *space, const struct graph *graph, const void *query,
                       uint32_t list_size, struct search_scratch *scratch);

#endif
