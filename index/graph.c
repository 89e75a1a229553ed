/* How graph_connect works: a walk in breadth from the entry point marks what is reached and notes
 * the node each was reached from. These tree edges alone keep everything reached, so any other
 * edge may be overwritten. An orphan is searched for: the search sees reached nodes only, and the
 * nearest of them that has room, or an edge to spare, gets the link. Then the walk goes on from
 * the orphan, which may bring in others. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "index/vamana.h"
#include "index/vamana_search.h"

#define CONNECT_LIST 64u
#define NOT_REACHED UINT32_MAX

void graph_free(struct graph *graph)
{
    if (!graph)
        return;
    free(graph->degrees);
    free(graph->neighbours);
    free(graph);
}

struct walk {
    struct graph *graph;
    uint32_t *from;  /* per node: its parent in the tree; the entry point's is itself */
    uint32_t *queue; /* reached nodes, in order */
    uint32_t reached;
    uint32_t spare; /* position in queue: the nodes before it have no edge to spare */
};

static void walk_on(struct walk *walk, uint32_t node, uint32_t from)
{
    struct graph *graph = walk->graph;
    uint32_t head = walk->reached;

    walk->from[node] = from;
    walk->queue[walk->reached++] = node;
    while (head < walk->reached) {
        uint32_t at = walk->queue[head++];
        const uint32_t *neighbours = graph->neighbours + (uint64_t)at * graph->max_degree;

        for (uint32_t i = 0; i < graph->degrees[at]; i++) {
            if (walk->from[neighbours[i]] != NOT_REACHED)
                continue;
            walk->from[neighbours[i]] = at;
            walk->queue[walk->reached++] = neighbours[i];
        }
    }
}

/* Adds node -> orphan; false if node is full of tree edges. */
static bool link_from(struct walk *walk, uint32_t node, uint32_t orphan)
{
    struct graph *graph = walk->graph;
    uint32_t *neighbours = graph->neighbours + (uint64_t)node * graph->max_degree;

    if (graph->degrees[node] < graph->max_degree) {
        neighbours[graph->degrees[node]++] = orphan;
        return true;
    }
    for (uint32_t i = graph->max_degree; i > 0; i--) {
        if (walk->from[neighbours[i - 1]] == node)
            continue;
        /* The link goes last: it is the repair's, not the prune's. */
        memmove(neighbours + i - 1, neighbours + i, (graph->max_degree - i) * sizeof *neighbours);
        neighbours[graph->max_degree - 1] = orphan;
        return true;
    }
    return false;
}

static void link_orphan(struct walk *walk, const struct row_space *space,
                        struct search_scratch *scratch, uint32_t orphan)
{
    vamana_search_run(space, walk->graph, row_space_row(space, orphan), CONNECT_LIST, scratch);
    for (uint32_t i = 0; i < scratch->list.count; i++) {
        uint32_t node = scratch->list.items[i].id;

        if (link_from(walk, node, orphan)) {
            walk_on(walk, orphan, node);
            return;
        }
    }
    /* Leaves of the tree have no tree edges, so there always is one. Tree edges are never taken
     * away: a node that once had nothing to spare never will. */
    for (;;) {
        uint32_t node;

        assert(walk->spare < walk->reached);
        node = walk->queue[walk->spare];
        if (link_from(walk, node, orphan)) {
            walk_on(walk, orphan, node);
            return;
        }
        walk->spare++;
    }
}

int graph_connect(const struct vector_matrix *vectors, struct graph *graph, uint64_t *linked,
                  struct error *err)
{
    struct walk walk = {.graph = graph};
    struct search_scratch scratch = {0};
    struct row_space space;
    int rc = -1;

    *linked = 0;
    if (row_space_init(&space, vectors, err) < 0)
        goto done;
    if (graph->count != vectors->count || graph->max_degree == 0 ||
        graph->entry_point >= graph->count) {
        error_set(err, ERR_INVALID, "graph of %u nodes, degree %u, entry point %u over %u vectors",
                  graph->count, graph->max_degree, graph->entry_point, vectors->count);
        goto done;
    }
    walk.from = malloc((size_t)graph->count * sizeof *walk.from);
    walk.queue = malloc((size_t)graph->count * sizeof *walk.queue);
    if (!walk.from || !walk.queue) {
        error_set(err, ERR_NOMEM, "graph repair: no memory for %u nodes", graph->count);
        goto done;
    }
    memset(walk.from, 0xff, (size_t)graph->count * sizeof *walk.from);
    walk_on(&walk, graph->entry_point, graph->entry_point);
    if (walk.reached < graph->count) {
        if (search_scratch_init(&scratch, CONNECT_LIST, graph->max_degree, err) < 0)
            goto done;
        for (uint32_t node = 0; node < graph->count; node++) {
            if (walk.from[node] != NOT_REACHED)
                continue;
            link_orphan(&walk, &space, &scratch, node);
            ++*linked;
        }
    }
    rc = 0;
done:
    search_scratch_release(&scratch);
    free(walk.from);
    free(walk.queue);
    return rc;
}
