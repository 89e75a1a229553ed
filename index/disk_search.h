/* disk_search: beam search over a segment's pages, as one query's state machine.
 *
 * Subramanya et al. 2019 (DiskANN), with pages that hold several nodes: a step reads the pages of
 * the best unexpanded candidates, scores every vector on them from its stored form, and expands all
 * loaded nodes that rank in the list before reading again. Codes steer; stored vectors decide.
 *
 * The caller drives: disk_search_begin, then as long as disk_search_done is false take the wanted
 * reads (disk_search_wanted), read them, and hand each completed one back (disk_search_arrived).
 * Arrivals are applied in the order the reads were issued, so an answer does not depend on timing.
 * One struct serves one query at a time and allocates nothing after disk_search_new. */
#ifndef ANND_INDEX_DISK_SEARCH_H
#define ANND_INDEX_DISK_SEARCH_H

#include <stdbool.h>
#include <stdint.h>

#include "index/disk_index.h"
#include "storage/reader.h"

#define DISK_SEARCH_BEAM_MAX 64u
#define SEARCH_LIST_MAX 16384u

struct search_params {
    uint32_t k;            /* 1..search_list */
    uint32_t search_list;  /* candidates kept; raised to k */
    uint32_t beam_width;   /* 0: the scratch's */
    uint64_t deadline_us;  /* CLOCK_MONOTONIC; 0: none */
    const bool *cancelled; /* read atomically at every step; may be NULL */
};

struct search_hit {
    uint32_t position; /* row position in the segment */
    float distance;    /* smaller is nearer: squared L2, minus the inner product, 1 - cosine */
    int64_t key;       /* int64 key from the page; the row position for varchar keys */
};

struct search_stats {
    uint32_t rounds;        /* dependent read steps */
    uint32_t reads;         /* in 4 KiB units */
    uint32_t resident_hits; /* pages taken from memory */
    uint32_t expanded;      /* nodes whose edges were followed */
    uint32_t estimates;     /* distances estimated on codes */
    uint32_t exact;         /* stored vectors scored */
    uint64_t read_bytes;
    float latency_us; /* from submission to the answer; the engine's */
};

/* The score the wire contract reports for a distance: L2 as is, IP and COSINE turned back. */
float search_score(enum metric metric, float distance);

struct disk_search;

struct disk_search_limits {
    uint32_t search_list_max;
    uint32_t k_max;
    uint32_t beam_width; /* pages in flight at most */
    uint32_t dim_max;
    uint32_t page_bytes_max;
    uint64_t table_floats_max;
    uint64_t scratch_floats_max;
};

int disk_search_new(const struct disk_search_limits *limits, struct disk_search **out,
                    struct error *err);
void disk_search_free(struct disk_search *search);
uint64_t disk_search_memory_bytes(const struct disk_search_limits *limits);

/* Starts a query (dim floats, copied). ERR_INVALID when it exceeds the limits. */
int disk_search_begin(struct disk_search *search, const struct disk_index *index,
                      const float *query, const struct search_params *params, struct error *err);
/* Reads to submit now; the structs and their buffers belong to the search. 0 while all are in
 * flight or the query is done. */
uint32_t disk_search_wanted(struct disk_search *search, struct reader_read **reads, uint32_t max);
/* A read came back (in any order). -1 when the query failed: then it is done, once the other reads
 * in flight have arrived too. */
int disk_search_arrived(struct disk_search *search, struct reader_read *read, struct error *err);
bool disk_search_done(const struct disk_search *search);
/* 0, or -1 with the reason when the query failed. For a query that is done. */
int disk_search_error(const struct disk_search *search, struct error *err);
/* Reads out the answer, best first, ties by key; returns the number of hits. */
uint32_t disk_search_hits(struct disk_search *search, struct search_hit *hits, uint32_t max);
const struct search_stats *disk_search_stats(const struct disk_search *search);

#endif
