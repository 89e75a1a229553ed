/* collection_search: one search request over all segments of a collection.
 *
 * Every (query, segment) pair is a task of the search engine; a bounded number of them is in the
 * engine at a time, so that a request of thousands of queries leaves room for others. Results of a
 * query's segments are merged best first, ties by key.
 *
 * A recall target holds for each segment by its own calibration, hence for the merged rows too:
 * those of the true nearest rows that lie in a segment are among its own nearest. */
#ifndef ANND_SRC_COLLECTION_SEARCH_H
#define ANND_SRC_COLLECTION_SEARCH_H

#include "index/index_directory.h"
#include "index/search_engine.h"
#include "src/request.h"
#include "storage/base/arena.h"

/* A row of an answer, or of any fetch. */
struct result_row {
    uint32_t segment;
    uint32_t position;
    int64_t key; /* of an int64 key field */
    float distance;
};

struct search_totals {
    uint64_t rounds;
    uint64_t reads;
    uint64_t resident_hits;
    uint64_t scanned;
    uint64_t estimates;
    uint64_t exact;
    uint64_t stops[STOP_READS + 1]; /* walks, by enum search_stop */
};

/* How one segment is searched: the same for all queries of a request. */
struct search_part {
    uint32_t segment;
    const struct disk_index *index;
    struct search_effort effort;
    struct search_params params; /* of its tasks */
    float reads_expected;        /* by its calibration; 0: unknown */
    bool calibrated;
};

struct collection_search;

/* Starts the search of a checked request on vector field `field`. Everything is in `arena`, which
 * with the request must live until the end. `done` is called once, on an engine's thread, perhaps
 * before this returns; after it the caller finishes. -1: nothing was started, done is not called;
 * ERR_BUSY, ERR_BUDGET. */
int collection_search_start(struct search_engine *engine, const struct index_directory *index,
                            uint32_t field, const struct search_request *request,
                            struct arena *arena, void (*done)(void *context), void *context,
                            struct collection_search **out, struct error *err);
/* The answer: all queries' rows one after the other, counts[i] of query i. In the arena. */
int collection_search_finish(struct collection_search *search, struct result_row **rows,
                             uint32_t *row_count, uint32_t **counts, struct search_totals *totals,
                             struct error *err);

/* After a finish that succeeded. The segments that were searched: */
uint32_t collection_search_parts(const struct collection_search *search,
                                 const struct search_part **parts);
/* What one query took: its segments added up, but for rounds and latency_us, which run side by side
 * and give the greatest. stopped[s] tells whether some segment's walk ended by s; stats->stop is
 * STOP_NONE when they differ. */
void collection_search_query(const struct collection_search *search, uint32_t query,
                             struct search_stats *stats, bool stopped[STOP_READS + 1]);

#endif
