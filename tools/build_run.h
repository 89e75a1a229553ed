/* build_run: one run of a build in its folder, the first (annd build) or a later one (annd resume):
 * what both do, and what both say. */
#ifndef ANND_TOOLS_BUILD_RUN_H
#define ANND_TOOLS_BUILD_RUN_H

#include <stdbool.h>

#include "index/build_plan.h"
#include "index/segment_build.h"
#include "storage/file.h"
#include "storage/journal.h"
#include "tools/options.h"
#include "tools/queries.h"

struct build_run {
    const struct arguments *asked; /* of annd build, as given or from the record */
    char folder[FILE_PATH_MAX];    /* of the index; no slash at its end */
    uint64_t memory_bytes;         /* granted to the process */
    struct segment_build_params params;
    struct build_plan plan; /* of memory and disk */
    struct vector_source *source;
    struct queries queries; /* of --calibrate */
    struct pool *pool;
    struct job *job;
    struct journal *journal;
};

/* Takes the path of the index directory. ERR_INVALID when it is too long. */
int build_run_folder(struct build_run *run, const char *path, struct error *err);
/* The parameters as asked for, defaults not filled in and no memory granted; also for annd plan. */
int build_run_params(const struct arguments *asked, struct segment_build_params *params,
                     struct error *err);
/* Memory of the machine, less a tenth for the rest of it. */
uint64_t build_run_memory_default(void);
/* Reads the parameters, opens the input, and refuses what cannot work: ERR_INVALID, ERR_NOT_FOUND,
 * ERR_BUDGET and so on. Nothing is written. `threads` 0: all cores; `memory_bytes` 0: what the
 * machine has, less a tenth. */
int build_run_prepare(struct build_run *run, uint32_t threads, uint64_t memory_bytes,
                      struct error *err);
/* Works in the folder of run->journal until the index is whole there and nothing of the journal is
 * left, and prints what was made. After a failure the journal is closed and what happens to the
 * folder is said: `fresh` (annd build): the input's own errors remove it, as there is nothing to go
 * on with; otherwise it is kept and annd resume goes on. */
int build_run_work(struct build_run *run, bool fresh, struct error *err);
void build_run_release(struct build_run *run);

/* 1 when `folder` holds a whole index, 0 when it has no MANIFEST, -1 when it has one that fails a
 * check. */
int build_run_is_whole(const char *folder, struct error *err);

#endif
