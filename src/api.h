/* api: the routes, and what their handlers share. Handlers run on HTTP threads, see http.h. */
#ifndef ANND_SRC_API_H
#define ANND_SRC_API_H

#include "src/codec_rest.h"
#include "src/http.h"
#include "src/service.h"

extern const struct http_route api_routes[];
extern const uint32_t api_route_count;

/* The context of the HTTP server is the service. */
struct service *api_service(struct http_exchange *exchange);
/* Answers and ends the exchange. */
void api_fail(struct http_exchange *exchange, const struct failure *failure);
/* The writer's text, or its failure; releases the writer. */
void api_reply(struct http_exchange *exchange, struct json_writer *writer);
/* {"code":0,"data":{}} */
void api_reply_done(struct http_exchange *exchange);
/* Starts {"code":0,"data": in a writer. api_end closes the object and replies. */
void api_begin(struct json_writer *writer);
void api_end(struct http_exchange *exchange, struct json_writer *writer);
/* What is wrong below, for the client and, where it is our matter, for the log. */
void api_failure_from_error(struct http_exchange *exchange, const struct error *err,
                            struct failure *failure);

/* The database a request means, by body, header or default; one that exists. */
int api_database(struct http_exchange *exchange, const char *named, const char **out,
                 struct failure *failure);
/* The open collection a request means; -1 also when it is damaged. */
int api_collection(struct http_exchange *exchange, const struct rest_target *target,
                   struct collection **out, struct failure *failure);
bool api_int64_as_text(struct http_exchange *exchange);

/* api_collections.c */
void api_collections_list(struct http_exchange *exchange);
void api_collections_has(struct http_exchange *exchange);
void api_collections_describe(struct http_exchange *exchange);
void api_collections_get_stats(struct http_exchange *exchange);
void api_collections_get_load_state(struct http_exchange *exchange);
void api_collections_load(struct http_exchange *exchange);
void api_indexes_list(struct http_exchange *exchange);
void api_indexes_describe(struct http_exchange *exchange);
void api_partitions_list(struct http_exchange *exchange);
void api_partitions_has(struct http_exchange *exchange);
void api_aliases_list(struct http_exchange *exchange);
void api_aliases_describe(struct http_exchange *exchange);
void api_databases_list(struct http_exchange *exchange);
void api_databases_describe(struct http_exchange *exchange);

/* api_entities.c */
void api_entities_search(struct http_exchange *exchange);
void api_entities_get(struct http_exchange *exchange);

/* api_admin.c */
void api_healthz(struct http_exchange *exchange);
void api_health(struct http_exchange *exchange);
void api_metrics(struct http_exchange *exchange);

#endif
