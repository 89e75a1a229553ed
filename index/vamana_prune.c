/* How it works: DiskANN's code updates, for every neighbour it keeps, the occlusion factor of all
 * candidates behind it. Here each candidate looks at the kept neighbours instead, nearest first,
 * and stops at the first that occludes it, which is the same choice for about half the distances.
 * What pass one learns is not asked again: pass two goes on, with the wider alpha, where the
 * candidate stopped, and only candidates that the stopping neighbour does not occlude under the
 * wider alpha too take part in it. */
#include "index/vamana_prune.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { PRUNE_WAITING = 0, PRUNE_KEPT = 1, PRUNE_DEAD = 2 }; /* of struct candidate's state */

int prune_scratch_init(struct prune_scratch *scratch, uint32_t pool_limit, uint32_t max_degree,
                       struct error *err)
{
    memset(scratch, 0, sizeof *scratch);
    scratch->pool_limit = pool_limit;
    scratch->pool = malloc((size_t)pool_limit * sizeof *scratch->pool);
    scratch->kept_seen = malloc((size_t)pool_limit * sizeof *scratch->kept_seen);
    scratch->kept_checked = malloc((size_t)pool_limit * sizeof *scratch->kept_checked);
    scratch->kept_rows = malloc((size_t)max_degree * sizeof *scratch->kept_rows);
    if (!scratch->pool || !scratch->kept_seen || !scratch->kept_checked || !scratch->kept_rows) {
        prune_scratch_release(scratch);
        return error_set(err, ERR_NOMEM, "prune: no memory for a pool of %u", pool_limit);
    }
    return 0;
}

void prune_scratch_release(struct prune_scratch *scratch)
{
    free(scratch->pool);
    free(scratch->kept_seen);
    free(scratch->kept_checked);
    free(scratch->kept_rows);
    memset(scratch, 0, sizeof *scratch);
}

uint64_t prune_scratch_memory_bytes(uint32_t pool_limit, uint32_t max_degree)
{
    return (uint64_t)pool_limit * (sizeof(struct candidate) + 2 * sizeof(uint32_t)) +
           (uint64_t)max_degree * sizeof(const uint8_t *);
}

/* Index of the first of kept[from..to) that occludes a vector at `distance` from the node, or to.
 * *between: its distance to the vector. A twin of a kept vector (distance 0) is always occluded,
 * or copies of one vector would fill each other's lists and be cut off from the rest. */
static uint32_t first_occluder(const struct row_space *space, const uint8_t *const *kept,
                               uint32_t from, uint32_t to, const uint8_t *row, float distance,
                               float alpha, float *between)
{
    for (uint32_t i = from; i < to; i++) {
        float d = row_space_distance(space, kept[i], row);

        if (d == 0 || alpha * d < distance) {
            *between = d;
            return i;
        }
    }
    return to;
}

uint32_t vamana_prune_run(const struct row_space *space, const struct prune_params *params,
                          struct prune_scratch *scratch, uint32_t pool_count, uint32_t *kept)
{
    struct candidate *pool = scratch->pool;
    const uint8_t **rows = scratch->kept_rows;
    uint32_t first = 0; /* kept by pass one */
    uint32_t count;

    assert(pool_count <= scratch->pool_limit);
    candidates_sort(pool, pool_count);
    for (uint32_t i = 0; i < pool_count && first < params->max_degree; i++) {
        const uint8_t *row = row_space_row(space, pool[i].id);
        float between = 0;
        uint32_t occluder;

        pool[i].state = PRUNE_WAITING; /* the rest matters only to a list that is not full */
        scratch->kept_seen[i] = first;
        occluder = first_occluder(space, rows, 0, first, row, pool[i].distance, 1.0f, &between);
        if (occluder == first) {
            pool[i].state = PRUNE_KEPT;
            rows[first] = row;
            kept[first++] = pool[i].id;
        } else if (between == 0 || params->alpha * between < pool[i].distance) {
            pool[i].state = PRUNE_DEAD;
        }
        scratch->kept_checked[i] = occluder + 1;
    }
    count = first;
    for (uint32_t i = 0; i < pool_count && count < params->max_degree && params->alpha > 1; i++) {
        const uint8_t *row = row_space_row(space, pool[i].id);
        uint32_t seen = scratch->kept_seen[i];
        float between;

        if (pool[i].state != PRUNE_WAITING)
            continue;
        /* Kept neighbours farther than the candidate itself were kept after it and do not count. */
        if (first_occluder(space, rows, scratch->kept_checked[i], seen, row, pool[i].distance,
                           params->alpha, &between) < seen)
            continue;
        if (first_occluder(space, rows, first, count, row, pool[i].distance, params->alpha,
                           &between) < count)
            continue;
        pool[i].state = PRUNE_KEPT;
        rows[count] = row;
        kept[count++] = pool[i].id;
    }
    for (uint32_t i = 0; i < pool_count && count < params->max_degree && params->saturate; i++) {
        if (pool[i].state != PRUNE_KEPT)
            kept[count++] = pool[i].id;
    }
    return count;
}
