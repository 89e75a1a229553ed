/* request: the operations of the service as typed structs, with their defaults and limits.
 *
 * A codec turns bytes into these and back; no codec knows another. What a request borrows lives in
 * its arena. One table gives every failure its Milvus code, HTTP status and gRPC status. Pure
 * functions: any thread. */
#ifndef ANND_SRC_REQUEST_H
#define ANND_SRC_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "index/disk_search.h"
#include "index/schema.h"
#include "storage/base/arena.h"
#include "storage/base/error.h"

#define REQUEST_WINDOW_MAX 16384    /* limit, and offset + limit */
#define REQUEST_QUERY_MAX 16384     /* query vectors in one search */
#define REQUEST_RESULTS_MAX 1000000 /* query vectors x (offset + limit) */
#define REQUEST_LIMIT_DEFAULT 100
#define REQUEST_BEAM_WIDTH_DEFAULT 2 /* reads in flight of one query */
#define REQUEST_BEAM_WIDTH_MAX 16
#define REQUEST_RECALL_DEFAULT 0.97 /* of a field with a calibration, when nothing is asked */
#define REQUEST_RECALL_MIN 0.5
#define REQUEST_RECALL_MAX 0.9999
#define REQUEST_NAMES_MAX 1024 /* outputFields, partitionNames */
#define REQUEST_ANSWER_BYTES_MAX ((size_t)64 << 20)
#define REQUEST_DATABASE_DEFAULT "default"
#define REQUEST_PARTITION_DEFAULT "_default"

/* The contract's situations, section 2.3; the numbers stand in request.c's table. */
enum failure_code {
    FAILURE_NONE,
    FAILURE_NOT_READY,
    FAILURE_UNAVAILABLE,
    FAILURE_MEMORY,
    FAILURE_BUSY,
    FAILURE_INTERNAL,
    FAILURE_DISK_FULL,
    FAILURE_UNIMPLEMENTED,
    FAILURE_COLLECTION_NOT_FOUND,
    FAILURE_COLLECTION_NOT_LOADED,
    FAILURE_PARTITION_NOT_FOUND,
    FAILURE_INDEX_NOT_FOUND,
    FAILURE_DATABASE_NOT_FOUND,
    FAILURE_IO,
    FAILURE_INVALID_PARAMETER,
    FAILURE_TOO_LARGE,
    FAILURE_ALIAS_NOT_FOUND,
    FAILURE_FIELD_NOT_FOUND,
    FAILURE_JSON,
    FAILURE_MISSING,
    FAILURE_BAD_KEY,
    FAILURE_CANCELLED,
    FAILURE_TIMEOUT,
    FAILURE_OTHER, /* 65535: untyped in Milvus */
    FAILURE_COUNT
};

struct failure_row {
    int milvus_code;
    unsigned http_status;
    int grpc_status;
};

/* Why a request cannot be answered. Zeroed: it can. The first failure wins. */
struct failure {
    enum failure_code code;
    char message[1100];
};

const struct failure_row *failure_row(enum failure_code code);
/* Always -1. */
int failure_set(struct failure *failure, enum failure_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* What went wrong below, in words fit for strangers: nothing of files and paths. Always -1. */
int failure_from_error(struct failure *failure, const struct error *err);

struct name_list {
    const char **names;
    uint32_t count;
    bool given;
};

/* searchParams after reading: 0 means not given. */
struct search_tuning {
    double recall_target; /* excludes the next four */
    uint32_t search_list;
    uint32_t ef;
    uint32_t nprobe;
    uint32_t level;
    uint32_t beam_width;
    bool early_reads;        /* the service's preference */
    uint32_t reads_max;      /* pages a query may read */
    bool exact_scores;       /* from the original vectors */
    bool explain;            /* the answer tells what the search did */
    const char *metric_type; /* NULL: not given */
    const char *range;       /* name of a range parameter that was given, or NULL */
    const char *group_by;    /* or NULL */
};

struct search_request {
    const char *anns_field; /* NULL: the only vector field */
    const float *const *queries;
    uint32_t query_count;
    int32_t limit;
    int32_t offset;
    struct name_list output;
    struct name_list partitions;
    struct search_tuning tuning;
    const char *filter;
    const char *grouping_field;
    const char *consistency;
    bool int64_as_text;
    uint64_t deadline_us;
    const bool *cancelled;
};

/* Text keys for a VarChar key field, numbers else; duplicates are allowed. */
struct request_key {
    int64_t number;
    const char *text;
    uint32_t text_bytes;
};

struct get_request {
    struct request_key *keys;
    uint32_t key_count;
    struct name_list output;
    struct name_list partitions;
    const char *consistency;
    bool int64_as_text;
};

void search_request_init(struct search_request *request);
void get_request_init(struct get_request *request);

/* NULL or "" (the collection's) or one of the five levels. */
int request_check_consistency(const char *level, struct failure *failure);
/* limit, offset, their sum, and the number of queries. */
int request_check_window(const struct search_request *request, struct failure *failure);
/* Only _default exists in a collection without partitions of its own. */
int request_check_partitions(const struct name_list *partitions, struct failure *failure);
/* What a read-only server cannot do: filters, ranges, groups. Refused, never ignored. */
int request_check_supported(const struct search_request *request, struct failure *failure);

/* The vector field a search means. */
int request_vector_field(const struct schema *schema, const char *anns_field, uint32_t *number,
                         struct failure *failure);
/* metric_type against the index's metric. */
int request_check_metric(const struct search_tuning *tuning, enum metric metric,
                         struct failure *failure);

/* How far a search goes: to a recall, or to the end of a list. */
struct search_effort {
    const char *given_by; /* the parameter's name, or "default" */
    double recall_target; /* 0: a list decides */
    uint32_t search_list; /* 0: the recall target decides */
};

/* The effort for `topk` results. recall_target as it is; `level` 1..10 stands for rising targets
 * from 0.90 to 0.995; search_list, ef and nprobe for lists, in this order (contract 18.3), cut to
 * topk..SEARCH_LIST_MAX. With none of them REQUEST_RECALL_DEFAULT where the field has a calibration
 * that can tell what it takes, else a list of max(100, 2 topk). */
void request_search_effort(const struct search_tuning *tuning, uint32_t topk, bool calibrated,
                           struct search_effort *out);

/* What a row of an answer shows. The key always; `fields` are schema fields by their place. */
struct output_plan {
    bool fields[SCHEMA_FIELD_MAX];
    bool all_dynamic;
    const char **dynamic; /* keys */
    uint32_t dynamic_count;
    bool records; /* something of the stored record is needed */
    bool vectors;
};

/* names "*", fields, dynamic keys, $meta and $meta["k"]; `all` when none were given. */
int output_plan_make(const struct schema *schema, const struct name_list *names, bool all,
                     struct arena *arena, struct output_plan *plan, struct failure *failure);

/* "Int8Vector", ...: the wire's type of a field, which for u8 vectors is FloatVector. */
const char *request_field_type(const struct schema_field *field);

/* 1 t T TRUE true True, 0 f F FALSE false False; anything else gives `otherwise`. */
bool request_parse_bool(const char *text, bool otherwise);

#endif
