/* disk_search: one query's walk over a segment's pages, as a state machine.
 *
 * Subramanya et al. 2019 (DiskANN), with pages that hold several nodes and seeds from scanned
 * cells: a query scans the codes of its nearest cells (cells.h), then reads the pages of the best
 * candidates, scores every vector on them from its stored form, and expands all loaded nodes that
 * rank in the list before it reads again. It stops by its rule (walk_rule.h). Codes steer; stored
 * vectors decide.
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
#include "index/walk_rule.h"
#include "storage/reader.h"

#define DISK_SEARCH_BEAM_MAX 64u
#define DISK_SEARCH_CELLS_MAX 4096u
#define SEARCH_LIST_MAX 16384u

struct search_hit {
    uint32_t position; /* row position in the segment */
    float distance;    /* smaller is nearer: squared L2, minus the inner product, 1 - cosine */
    int64_t key;       /* int64 key from the page; the row position for varchar keys */
};

/* The state of a walk each time it could stop; for calibration. */
struct search_moment {
    uint32_t reads; /* pages worked off so far, resident ones not counted */
    uint32_t quiet; /* of those, the last ones in a row that brought no new hit */
    float gain;     /* expected hits among the unread candidates; INFINITY below k hits */
    uint32_t hit_count;
    const struct search_hit *hits; /* ascending by (distance, key) */
};

struct search_params {
    uint32_t k;
    struct walk_rule rule;  /* search_list is raised to k */
    uint32_t beam_width;    /* reads in flight; 0: the scratch's */
    uint32_t reads_max;     /* stop after so many pages read; 0: no limit */
    bool early_reads;       /* for latency: read the nearest before all cells are scanned */
    bool exact_scores;      /* score the hits again from the originals, in one burst of reads */
    bool explain;           /* measure the time of each phase */
    uint64_t deadline_us;   /* CLOCK_MONOTONIC; 0: none */
    const bool *cancelled;  /* read atomically at every step; may be NULL */
    const uint32_t *hidden; /* a position that is treated as not there; may be NULL */
    void (*observe)(void *context, const struct search_moment *moment); /* may be NULL */
    void *observe_context;
};

enum search_stop {
    STOP_NONE = 0,
    STOP_GAIN, /* the rule: few better rows were to be expected */
    STOP_LIST, /* no unread candidate was left in the list */
    STOP_READS /* reads_max */
};

const char *search_stop_name(enum search_stop stop);

struct search_stats {
    uint32_t rounds;        /* dependent read steps */
    uint32_t reads;         /* in 4 KiB units, those of exact_scores included */
    uint32_t resident_hits; /* pages taken from memory */
    uint32_t expanded;      /* nodes whose edges were followed */
    uint32_t cells;         /* cells scanned */
    uint32_t scanned;       /* codes estimated in cells */
    uint32_t estimates;     /* codes estimated as neighbours */
    uint32_t exact;         /* stored vectors scored */
    uint64_t read_bytes;
    float gain; /* expected hits left when it stopped */
    enum search_stop stop;
    float latency_us; /* from submission to the answer; the engine's */
    /* With explain: time on the CPU by phase; the rest of the latency is waiting. */
    float prepare_us; /* tables, rotation */
    float seed_us;    /* ranking and scanning cells */
    float score_us;   /* checking pages, scoring their vectors */
    float expand_us;  /* edges, estimates, the list */
    float exact_us;   /* exact_scores */
};

/* The score the wire contract reports for a distance: L2 as is, IP and COSINE turned back. */
float search_score(enum metric metric, float distance);

struct disk_search;

struct disk_search_limits {
    uint32_t search_list_max;
    uint32_t cells_max;
    uint32_t k_max;
    uint32_t beam_width; /* pages in flight at most */
    uint32_t dim_max;
    uint32_t buffer_bytes_max;       /* of a page, or of the blocks one original spans */
    uint64_t table_entries_max;      /* quantiser_table_entries */
    uint64_t scratch_floats_max;     /* quantiser_scratch_floats */
    uint64_t cell_scratch_bytes_max; /* cells_scratch_bytes for cells_max */
};

/* Raises what the index needs in limits that start as zero; the lists, k, cells and beam are the
 * caller's to set first. */
void disk_search_limits_raise(struct disk_search_limits *limits, const struct disk_index *index);

/* What the searches of one thread share, at the same limits. ERR_NOMEM. */
struct walk_scratch;

int walk_scratch_new(const struct disk_search_limits *limits, struct walk_scratch **out,
                     struct error *err);
void walk_scratch_free(struct walk_scratch *scratch);
uint64_t walk_scratch_memory_bytes(const struct disk_search_limits *limits);

/* The scratch is borrowed: all searches that have the same one are driven by one thread. */
int disk_search_new(const struct disk_search_limits *limits, struct walk_scratch *scratch,
                    struct disk_search **out, struct error *err);
void disk_search_free(struct disk_search *search);
uint64_t disk_search_memory_bytes(const struct disk_search_limits *limits);

/* Starts a query (dim floats, copied). ERR_INVALID when it exceeds the limits; ERR_UNSUPPORTED when
 * exact_scores is asked of a field whose originals were dropped. */
int disk_search_begin(struct disk_search *search, const struct disk_index *index,
                      const float *query, const struct search_params *params, struct error *err);
/* True after a begin with early reads: those are to be submitted, and disk_search_continue then
 * scans the other cells while the drive works. An arrival continues by itself: the answer is the
 * same. */
bool disk_search_seeding(const struct disk_search *search);
void disk_search_continue(struct disk_search *search);
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
