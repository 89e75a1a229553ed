/* How it works: memory latency is the cost, so a node is expanded in two rounds: first its
 * neighbours are checked against the visited set, then distances are taken, each vector requested
 * some before its turn. The adjacency of the candidate likely to be next is
 * requested before the distances of the present one are computed. */
#include "index/vamana_search.h"

#include <stdlib.h>
#include <string.h>

#define PREFETCH_AHEAD 4u

int row_space_init(struct row_space *space, const struct vector_matrix *vectors, struct error *err)
{
    memset(space, 0, sizeof *space);
    switch (vectors->type) {
    case ELEMENT_F32:
    case ELEMENT_F16:
    case ELEMENT_U8:
    case ELEMENT_I8:
        break;
    default:
        return error_set(err, ERR_INVALID, "no graph over vectors of type %s: f32, f16, u8 or i8",
                         element_name(vectors->type));
    }
    if (vectors->count == 0 || vectors->dim == 0 || vectors->dim > DISTANCE_DIM_MAX)
        return error_set(err, ERR_INVALID, "no graph over %u vectors of %u dimensions (1..%u)",
                         vectors->count, vectors->dim, DISTANCE_DIM_MAX);
    space->vector_bytes = element_bytes(vectors->type, vectors->dim);
    if (vectors->row_bytes < space->vector_bytes)
        return error_set(err, ERR_INVALID, "rows of %llu bytes cannot hold vectors of %llu",
                         (unsigned long long)vectors->row_bytes,
                         (unsigned long long)space->vector_bytes);
    space->data = vectors->data;
    space->row_bytes = vectors->row_bytes;
    space->count = vectors->count;
    space->dim = vectors->dim;
    space->type = vectors->type;
    space->kernels = distance_kernels_best();
    return 0;
}

const float *row_space_floats(const struct row_space *space, uint32_t row, float *buffer)
{
    const uint8_t *at = row_space_row(space, row);

    switch (space->type) {
    case ELEMENT_U8:
        for (uint32_t i = 0; i < space->dim; i++)
            buffer[i] = at[i];
        return buffer;
    case ELEMENT_I8:
        for (uint32_t i = 0; i < space->dim; i++)
            buffer[i] = ((const int8_t *)at)[i];
        return buffer;
    case ELEMENT_F16:
        space->kernels->f32_from_f16((const uint16_t *)at, buffer, space->dim);
        return buffer;
    default:
        return (const float *)at;
    }
}

/* Generous: on SIFT at degree 64, 24 rows are seen for each place in the list. */
static uint32_t expected_visits(uint32_t list_size, uint32_t max_degree)
{
    uint64_t visits = (uint64_t)list_size * max_degree * 3 / 4;

    return visits < 1u << 20 ? (uint32_t)visits : 1u << 20;
}

static uint32_t expanded_limit(uint32_t list_size)
{
    return 2 * list_size + 256;
}

int search_scratch_init(struct search_scratch *scratch, uint32_t list_size, uint32_t max_degree,
                        struct error *err)
{
    int rc = -1;

    memset(scratch, 0, sizeof *scratch);
    if (candidates_init(&scratch->list, list_size, err) < 0)
        goto done;
    if (visited_init(&scratch->visited, expected_visits(list_size, max_degree), err) < 0)
        goto done;
    scratch->expanded_limit = expanded_limit(list_size);
    scratch->fresh = malloc((size_t)max_degree * sizeof *scratch->fresh);
    scratch->expanded = malloc((size_t)scratch->expanded_limit * sizeof *scratch->expanded);
    if (!scratch->fresh || !scratch->expanded) {
        error_set(err, ERR_NOMEM, "graph search: no memory for a list of %u", list_size);
        goto done;
    }
    rc = 0;
done:
    if (rc < 0)
        search_scratch_release(scratch);
    return rc;
}

void search_scratch_release(struct search_scratch *scratch)
{
    candidates_release(&scratch->list);
    visited_release(&scratch->visited);
    free(scratch->fresh);
    free(scratch->expanded);
    memset(scratch, 0, sizeof *scratch);
}

uint64_t search_scratch_memory_bytes(uint32_t list_size, uint32_t max_degree)
{
    return (uint64_t)list_size * sizeof(struct candidate) +
           visited_memory_bytes(expected_visits(list_size, max_degree)) +
           (uint64_t)max_degree * sizeof(uint32_t) +
           (uint64_t)expanded_limit(list_size) * sizeof(struct candidate);
}

static void prefetch_adjacency(const struct graph *graph, uint32_t node)
{
    const uint32_t *row = graph->neighbours + (uint64_t)node * graph->max_degree;

    __builtin_prefetch(&graph->degrees[node]);
    for (uint32_t i = 0; i < graph->max_degree; i += 16)
        __builtin_prefetch(row + i);
}

void vamana_search_run(const struct row_space *space, const struct graph *graph, const void *query,
                       uint32_t list_size, struct search_scratch *scratch)
{
    struct candidates *list = &scratch->list;
    struct candidate *node;
    uint64_t expanded = 0;

    candidates_clear(list, list_size);
    visited_clear(&scratch->visited);
    visited_add(&scratch->visited, graph->entry_point);
    candidates_insert(list,
                      row_space_distance(space, query, row_space_row(space, graph->entry_point)),
                      graph->entry_point);

    while ((node = candidates_nearest_open(list)) != NULL) {
        const uint32_t *neighbours = graph->neighbours + (uint64_t)node->id * graph->max_degree;
        uint32_t degree = graph->degrees[node->id];
        uint32_t fresh = 0;

        node->state = CANDIDATE_EXPANDED;
        scratch->expanded[expanded++ % scratch->expanded_limit] = *node;
        for (uint32_t i = 0; i < degree; i++) {
            uint32_t id = neighbours[i];

            scratch->fresh[fresh] = id; /* overwritten by the next if it is not */
            fresh += visited_add(&scratch->visited, id);
        }
        node = candidates_nearest_open(list);
        if (node)
            prefetch_adjacency(graph, node->id);
        for (uint32_t i = 0; i < fresh && i < PREFETCH_AHEAD; i++)
            row_space_prefetch(space, scratch->fresh[i]);
        for (uint32_t i = 0; i < fresh; i++) {
            uint32_t id = scratch->fresh[i];
            float distance;

            if (i + PREFETCH_AHEAD < fresh)
                row_space_prefetch(space, scratch->fresh[i + PREFETCH_AHEAD]);
            distance = row_space_distance(space, query, row_space_row(space, id));

            if (candidates_admits(list, distance))
                candidates_insert(list, distance, id);
        }
    }
    scratch->expanded_count =
        expanded < scratch->expanded_limit ? (uint32_t)expanded : scratch->expanded_limit;
}
