/* graph_store: a graph in a scratch file, a record of max_degree + 2 u32 for each place: how many
 * neighbours, these, zeros, and the CRC-32C of all that, seeded with the place.
 *
 * What leaf_graph.h makes, and what the pages are written from. Reads are any thread's. */
#ifndef ANND_INDEX_GRAPH_STORE_H
#define ANND_INDEX_GRAPH_STORE_H

#include <stdint.h>

#include "index/row_store.h"
#include "index/vamana.h"
#include "storage/base/job.h"
#include "storage/journal.h"

struct graph_store {
    uint32_t count;
    uint32_t max_degree;
    uint32_t entry_point; /* a place; set by graph_store_connect() */
    struct vfs_file *file;
    char *path;
};

/* Opens the file `name` of the journal's scratch folder; fresh: makes it anew. */
int graph_store_open(struct vfs *vfs, struct journal *journal, const char *name, uint32_t count,
                     uint32_t max_degree, bool fresh, struct graph_store **out, struct error *err);
void graph_store_close(struct graph_store *graph);

/* u32 a record. */
static inline uint32_t graph_record_words(uint32_t max_degree)
{
    return max_degree + 2;
}

/* Records of places [first, first + count). Read ones are checked: ERR_CORRUPT for a checksum that
 * fails, a degree or a neighbour that cannot be. Writing sets the checksums. */
int graph_store_read(const struct graph_store *graph, uint32_t first, uint32_t count,
                     uint32_t *records, struct error *err);
int graph_store_write(struct graph_store *graph, uint32_t first, uint32_t count, uint32_t *records,
                      struct error *err);
int graph_store_sync(struct graph_store *graph, struct error *err);

/* Chooses the entry point (the row nearest to the rows' mean, as far as centroids tell) and links
 * every place that cannot be reached from it to a near one that can, in place of an edge that
 * nothing hangs on where the near one is full. *linked: how many. Resumable: what is to change is
 * written down (scratch "patches") and committed before it is changed. Takes 5 bytes a row and a
 * record for each patched place. */
int graph_store_connect(struct graph_store *graph, const struct row_store *store,
                        struct journal *journal, struct pool *pool, struct job *job,
                        uint64_t *linked, struct error *err);

/* A graph in memory (vamana_build's) written as the file, and its entry point. */
int graph_store_fill(struct graph_store *store, const struct graph *graph, struct error *err);

#endif
