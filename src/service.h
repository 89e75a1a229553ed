/* service: one data directory, opened for reading: its collections, one search engine for all of
 * them, one pool of workers.
 *
 * A collection that cannot be opened is kept as damaged, with the reason, and the others serve.
 * Immutable once open, but for counters: any thread. */
#ifndef ANND_SRC_SERVICE_H
#define ANND_SRC_SERVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "index/index_directory.h"
#include "index/search_engine.h"
#include "src/metrics.h"
#include "src/worker.h"
#include "storage/base/error.h"
#include "storage/reader.h"

struct data_directory;

struct service_options {
    const char *data;
    uint64_t memory_bytes; /* 0: half of what this machine or its cgroup has */
    uint32_t threads;      /* search threads; 0: one per CPU */
    bool prefer_latency;   /* fewer reads outstanding over all, more of them a query */
    enum reader_backend backend;
};

struct collection {
    uint64_t id;
    const char *database; /* the names are the data directory's */
    const char *name;
    const char *description;
    const char *const *aliases;
    uint32_t alias_count;
    struct index_directory *index; /* NULL: damaged */
    char *damage;                  /* why */
    struct collection_metrics metrics;
};

/* A name or an alias. */
struct service_name {
    const char *database;
    const char *name;
    struct collection *collection;
};

struct service {
    struct data_directory *data;
    struct collection *collections; /* by number */
    struct service_name *names;     /* sorted */
    uint32_t name_count;
    uint32_t collection_count;
    uint32_t damaged_count;
    struct search_engine *engine;
    struct worker_pool *workers;
    enum reader_backend backend;
    uint64_t memory_bytes; /* the budget */
    uint64_t memory_used;  /* indexes and engine */
    uint64_t started_us;
    uint32_t beam_width; /* of searches that ask for none */
    bool early_reads;    /* of all searches: for latency */
};

/* ERR_NOT_FOUND, ERR_BUSY when another server has the directory, ERR_BUDGET when what must be
 * resident does not fit; ERR_NOMEM. */
int service_open(const struct service_options *options, struct service **out, struct error *err);
/* No request may be under way. NULL is accepted. */
void service_close(struct service *service);

/* By name or alias; NULL when there is none. */
struct collection *service_find(const struct service *service, const char *database,
                                const char *name);
/* The default one, and those that hold a collection. */
bool service_has_database(const struct service *service, const char *database);
/* The calling thread's own reader, opened at its first call and closed when the thread ends. */
int service_reader(const struct service *service, struct reader **out, struct error *err);

#endif
