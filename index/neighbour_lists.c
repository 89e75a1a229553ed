/* How it works: a row's own neighbours in the graph are scored; so are, once each, the first
 * neighbours of the nearest of them (lists are in prune order, so the near and the varied ones
 * stand first). A hash set tagged with the row says what was scored already: it takes room for one
 * row's candidates, whatever the number of rows, and needs no clearing. Distance and row are packed
 * into 64 bits: squared distances are not negative, so their bits have the order of integers,
 * and ties fall to the lower row.
 *
 * Nearly all the time goes into waiting for rows. So rows are listed in bunches that hang together
 * in the graph: most of what one needs, the one before it has brought into the cache. */
#include "index/neighbour_lists.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "index/vamana_search.h"

#define BRIDGES 10u       /* nearest neighbours whose own neighbours are scored too, at least */
#define BRIDGE_DEGREE 40u /* of each of them */
#define BUNCH_ROWS 256u   /* rows of one range */
#define BUNCH_DEGREE 16u  /* nearest neighbours that join a bunch after a row */
#define PREFETCH_AHEAD 8u

struct worker_scratch {
    uint64_t *seen;  /* (row being listed + 1) << 32 | candidate */
    uint32_t *fresh; /* candidates not scored yet */
    uint64_t *best;  /* `keep` nearest, ascending: distance's bits << 32 | row */
    uint32_t best_count;
};

struct listing {
    struct row_space space;
    const struct graph *graph;
    struct job *job;
    uint32_t *order; /* in which rows are listed */
    uint32_t *rows;
    uint32_t k;
    uint32_t bridges;
    uint32_t keep; /* the larger of both */
    uint32_t seen_mask;
    struct worker_scratch *workers;
};

/* False if the candidate was there for this row. */
static bool add_seen(const struct listing *listing, struct worker_scratch *scratch, uint32_t row,
                     uint32_t candidate)
{
    uint64_t tag = (uint64_t)row + 1;
    uint64_t entry = tag << 32 | candidate;
    uint32_t at = (candidate * 2654435769u) >> 8 & listing->seen_mask;

    /* The table has twice the room that one row's candidates take: there is a free place. */
    while (scratch->seen[at] >> 32 == tag) {
        if (scratch->seen[at] == entry)
            return false;
        at = (at + 1) & listing->seen_mask;
    }
    scratch->seen[at] = entry;
    return true;
}

static void keep_best(const struct listing *listing, struct worker_scratch *scratch, uint64_t key)
{
    uint64_t *best = scratch->best;
    uint32_t at = scratch->best_count;

    if (at == listing->keep) {
        if (key > best[at - 1])
            return;
        at--;
    } else {
        scratch->best_count++;
    }
    for (; at > 0 && best[at - 1] > key; at--)
        best[at] = best[at - 1];
    best[at] = key;
}

static void score(const struct listing *listing, struct worker_scratch *scratch, uint32_t row,
                  uint32_t fresh_count)
{
    const struct row_space *space = &listing->space;
    const uint8_t *own = row_space_row(space, row);

    for (uint32_t i = 0; i < fresh_count; i++) {
        uint32_t candidate = scratch->fresh[i];
        float distance;
        uint32_t bits;

        if (i + PREFETCH_AHEAD < fresh_count)
            row_space_prefetch(space, scratch->fresh[i + PREFETCH_AHEAD]);
        distance = row_space_distance(space, own, row_space_row(space, candidate));
        memcpy(&bits, &distance, sizeof bits);
        keep_best(listing, scratch, (uint64_t)bits << 32 | candidate);
    }
}

/* Appends those of a node's first `limit` neighbours that are new, and asks for the first few. */
static uint32_t gather(const struct listing *listing, struct worker_scratch *scratch, uint32_t row,
                       uint32_t node, uint32_t limit, uint32_t fresh_count)
{
    const struct graph *graph = listing->graph;
    const uint32_t *neighbours = graph->neighbours + (uint64_t)node * graph->max_degree;
    uint32_t degree = graph->degrees[node] < limit ? graph->degrees[node] : limit;

    for (uint32_t i = 0; i < degree; i++) {
        if (!add_seen(listing, scratch, row, neighbours[i]))
            continue;
        if (fresh_count < PREFETCH_AHEAD)
            row_space_prefetch(&listing->space, neighbours[i]);
        scratch->fresh[fresh_count++] = neighbours[i];
    }
    return fresh_count;
}

static void prefetch_neighbours(const struct graph *graph, uint32_t node)
{
    const uint32_t *neighbours = graph->neighbours + (uint64_t)node * graph->max_degree;

    __builtin_prefetch(graph->degrees + node);
    for (uint32_t i = 0; i < graph->max_degree && i < BRIDGE_DEGREE; i += 16)
        __builtin_prefetch(neighbours + i);
}

static void list_row(const struct listing *listing, struct worker_scratch *scratch, uint32_t row)
{
    uint32_t *out = listing->rows + (uint64_t)row * listing->k;
    uint32_t bridges[BRIDGES];
    uint32_t bridge_count, fresh_count;

    scratch->best_count = 0;
    add_seen(listing, scratch, row, row);
    fresh_count = gather(listing, scratch, row, row, listing->graph->max_degree, 0);
    score(listing, scratch, row, fresh_count);

    bridge_count = scratch->best_count < listing->bridges ? scratch->best_count : listing->bridges;
    for (uint32_t i = 0; i < bridge_count; i++) {
        bridges[i] = (uint32_t)scratch->best[i];
        prefetch_neighbours(listing->graph, bridges[i]);
    }
    fresh_count = 0;
    for (uint32_t i = 0; i < bridge_count; i++)
        fresh_count = gather(listing, scratch, row, bridges[i], BRIDGE_DEGREE, fresh_count);
    score(listing, scratch, row, fresh_count);

    for (uint32_t i = 0; i < listing->k; i++)
        out[i] = i < scratch->best_count ? (uint32_t)scratch->best[i] : NEIGHBOUR_NONE;
}

/* Appends to a bunch: the rows from `start` on in breadth, up to its limit. */
static uint32_t order_bunch(const struct graph *graph, uint32_t start, uint8_t *taken,
                            uint32_t *order, uint32_t count)
{
    uint32_t head = count, limit = count + BUNCH_ROWS;

    taken[start] = 1;
    order[count++] = start;
    while (head < count && count < limit) {
        uint32_t node = order[head++];
        const uint32_t *neighbours = graph->neighbours + (uint64_t)node * graph->max_degree;

        for (uint32_t i = 0; i < graph->degrees[node] && i < BUNCH_DEGREE && count < limit; i++) {
            if (taken[neighbours[i]])
                continue;
            taken[neighbours[i]] = 1;
            order[count++] = neighbours[i];
        }
    }
    return count;
}

/* Bunch after bunch, each begun next to the one before it where that is possible. */
static int order_rows(struct listing *listing, struct error *err)
{
    const struct graph *graph = listing->graph;
    uint8_t *taken = calloc(graph->count, 1);
    uint32_t count = 0;

    listing->order = malloc((size_t)graph->count * sizeof *listing->order);
    if (!taken || !listing->order) {
        free(taken);
        return error_set(err, ERR_NOMEM, "neighbour lists: no memory to order %u rows",
                         graph->count);
    }
    for (uint32_t row = 0; row < graph->count; row++) {
        uint32_t start = row;

        while (!taken[start]) {
            const uint32_t *neighbours;
            uint32_t last;

            count = order_bunch(graph, start, taken, listing->order, count);
            last = listing->order[count - 1];
            neighbours = graph->neighbours + (uint64_t)last * graph->max_degree;
            for (uint32_t i = 0; i < graph->degrees[last] && taken[start]; i++)
                start = neighbours[i];
        }
    }
    free(taken);
    return 0;
}

static void list_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    const struct listing *listing = context;
    struct worker_scratch *scratch = &listing->workers[worker];

    if (job_cancelled(listing->job))
        return;
    for (uint64_t i = begin; i < end; i++) {
        if (i + 2 < end)
            prefetch_neighbours(listing->graph, listing->order[i + 2]);
        list_row(listing, scratch, listing->order[i]);
    }
    job_advance(listing->job, end - begin, NULL);
}

static int prepare(struct listing *listing, uint32_t workers, struct error *err)
{
    uint32_t candidates = 1 + listing->graph->max_degree + BRIDGES * BRIDGE_DEGREE;
    uint32_t places = 1024;

    while (places < 2 * candidates)
        places *= 2;
    listing->seen_mask = places - 1;
    listing->workers = calloc(workers, sizeof *listing->workers);
    if (!listing->workers)
        goto nomem;
    for (uint32_t i = 0; i < workers; i++) {
        struct worker_scratch *scratch = &listing->workers[i];

        scratch->seen = calloc(places, sizeof *scratch->seen);
        scratch->fresh = malloc(candidates * sizeof *scratch->fresh);
        scratch->best = malloc(listing->keep * sizeof *scratch->best);
        if (!scratch->seen || !scratch->fresh || !scratch->best)
            goto nomem;
    }
    return 0;
nomem:
    return error_set(err, ERR_NOMEM, "neighbour lists: no memory for %u workers", workers);
}

int neighbour_lists_make(const struct vector_matrix *vectors, const struct graph *graph, uint32_t k,
                         struct pool *pool, struct job *job, struct neighbour_lists *out,
                         struct error *err)
{
    struct listing listing = {
        .graph = graph, .job = job, .k = k, .bridges = BRIDGES, .keep = k > BRIDGES ? k : BRIDGES};
    uint32_t workers = pool ? pool_workers(pool) : 1;
    int rc = -1;

    memset(out, 0, sizeof *out);
    if (row_space_init(&listing.space, vectors, err) < 0)
        goto done;
    if (k == 0 || graph->count != vectors->count) {
        error_set(err, ERR_INVALID, "neighbour lists of %u rows, of a graph of %u nodes over %u", k,
                  graph->count, vectors->count);
        goto done;
    }
    if (prepare(&listing, workers, err) < 0 || order_rows(&listing, err) < 0)
        goto done;
    listing.rows = malloc((size_t)neighbour_lists_memory_bytes(vectors->count, k));
    if (!listing.rows) {
        error_set(err, ERR_NOMEM, "neighbour lists: no memory for %u rows by %u", vectors->count,
                  k);
        goto done;
    }
    job_phase(job, "nearest neighbours", vectors->count);
    pool_for(pool, vectors->count, BUNCH_ROWS, list_rows, &listing);
    if (job_advance(job, 0, err) < 0)
        goto done;
    *out = (struct neighbour_lists){.count = vectors->count, .k = k, .rows = listing.rows};
    listing.rows = NULL; /* moved to the caller */
    rc = 0;
done:
    for (uint32_t i = 0; listing.workers && i < workers; i++) {
        free(listing.workers[i].seen);
        free(listing.workers[i].fresh);
        free(listing.workers[i].best);
    }
    free(listing.workers);
    free(listing.order);
    free(listing.rows);
    return rc;
}

void neighbour_lists_release(struct neighbour_lists *lists)
{
    if (!lists)
        return;
    free(lists->rows);
    memset(lists, 0, sizeof *lists);
}

void neighbour_lists_in_degrees(const struct neighbour_lists *lists, uint32_t k, uint32_t *degrees)
{
    uint32_t places = k < lists->k ? k : lists->k;

    memset(degrees, 0, (size_t)lists->count * sizeof *degrees);
    for (uint32_t row = 0; row < lists->count; row++) {
        const uint32_t *list = lists->rows + (uint64_t)row * lists->k;

        for (uint32_t i = 0; i < places && list[i] != NEIGHBOUR_NONE; i++)
            degrees[list[i]]++;
    }
}

uint64_t neighbour_lists_memory_bytes(uint64_t count, uint32_t k)
{
    return count * k * sizeof(uint32_t);
}
