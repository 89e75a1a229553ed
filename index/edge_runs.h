/* edge_runs: edges on their way from the rows they leave to the rows they reach.
 *
 * A graph is made in the order of the rows edges come from; to see a row's incoming edges they have
 * to be turned around. They are appended to one file of blocks, each block for one range of
 * EDGE_RUNS_RANGE target rows, through a buffer a range; a table beside it says whose each block is
 * and how full. A range is then read back alone. Writing is sequential, memory is a buffer a range,
 * and what one commit speaks of is a number of blocks, so that a later process can go on there.
 * One thread writes; any number read afterwards. */
#ifndef ANND_INDEX_EDGE_RUNS_H
#define ANND_INDEX_EDGE_RUNS_H

#include <stdint.h>

#include "storage/base/error.h"
#include "storage/vfs.h"

#ifndef EDGE_RUNS_RANGE /* tests make it small */
#define EDGE_RUNS_RANGE 65536u
#endif

struct edge_runs;

struct edge {
    uint32_t to;
    uint32_t from;
};

/* Opens or makes the file `path` and the table `path`.table for `count` rows, and drops all beyond
 * the first `blocks` blocks: 0 for a new one. ERR_CORRUPT when there are fewer. */
int edge_runs_open(struct vfs *vfs, const char *path, uint32_t count, uint64_t blocks,
                   struct edge_runs **out, struct error *err);
void edge_runs_close(struct edge_runs *runs);

int edge_runs_add(struct edge_runs *runs, uint32_t to, uint32_t from, struct error *err);
/* Writes what is buffered and syncs: *blocks is what edge_runs_open() may be given from now on. */
int edge_runs_flush(struct edge_runs *runs, uint64_t *blocks, struct error *err);

uint32_t edge_runs_range_count(const struct edge_runs *runs);
/* Calls `each` with the edges of a range, block by block in the order they were added. Not before
 * edge_runs_flush(). */
typedef void (*edge_runs_fn)(void *context, const struct edge *edges, uint32_t count);
int edge_runs_read(const struct edge_runs *runs, uint32_t range, edge_runs_fn each, void *context,
                   struct error *err);

uint64_t edge_runs_memory_bytes(uint64_t count);

#endif
