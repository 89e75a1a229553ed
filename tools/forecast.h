/* forecast: how long a build will take and what its index will answer, from a small one.
 *
 * An even sample of the input is built with the same parameters in a temporary folder: the
 * miniature. Every phase of it is then scaled by what the phase does: rows, rows times their
 * logarithm, queries. What the miniature cannot show, since its files fit the page cache, is added
 * from a measurement of the disk. */
#ifndef ANND_TOOLS_FORECAST_H
#define ANND_TOOLS_FORECAST_H

#include <stdbool.h>
#include <stdint.h>

#include "index/build_plan.h"
#include "index/segment_build.h"
#include "index/walk_rule.h"
#include "tools/machine_probe.h"
#include "tools/row_input.h"

#define FORECAST_PHASES_MAX 32u
#define FORECAST_RECALLS 3u

/* What is to be built. */
struct forecast_work {
    const struct vector_source *source;
    struct row_input_files files; /* keys, attributes and so on; the miniature takes their heads */
    struct row_shape shape;
    struct segment_build_params
        params;          /* defaults filled in; memory_bytes: for the vectors' part */
    bool holds_keys;     /* on pages: keys are not text */
    double reads_growth; /* as struct forecast has it; negative: to be measured */
    struct pool *pool;
};

struct forecast_phase {
    const char *name;
    double cpu_seconds; /* of all its threads */
    double seconds;     /* of the miniature */
    double expected;    /* of the whole */
    double spread;      /* as a share of it, either way */
};

struct forecast {
    uint32_t sample_rows;
    struct forecast_phase phases[FORECAST_PHASES_MAX];
    uint32_t phase_count;
    double disk_seconds; /* waits for the disk that the miniature did not have */
    double seconds, seconds_low, seconds_high;
    uint64_t record_bytes;    /* of attributes and text keys in the index; beside the plan's */
    uint64_t serve_bytes_min; /* of memory: codes and tables */
    uint64_t serve_bytes;     /* with the pages that the granted memory holds */
    double resident_share;    /* of the pages */
    double reads_growth;      /* reads grow with this power of the rows */
    struct {
        double recall; /* at k = 10 */
        double reads;  /* a query; negative: not reached, or not known */
        double reads_low, reads_high;
    } points[FORECAST_RECALLS];
    uint32_t query_count; /* that the miniature was calibrated with; 0: too few rows */
};

/* Memory that must be served from: codes, cells and tables. From the parameters alone; the
 * miniature's own tables make it exact. */
uint64_t forecast_serve_bytes(const struct forecast_work *work);

/* Builds the miniature in `folder` (an existing one; all is removed again) and fills *out. plan: of
 * the whole; disk: of the folder it will be built in. Takes some seconds. ERR_CANCELLED after
 * progress_interrupted(); errors of segment_build(). */
int forecast_make(const struct forecast_work *work, const struct build_plan *plan,
                  const struct machine_disk *disk, const struct machine_memory *memory,
                  const char *folder, struct forecast *out, struct error *err);

#endif
