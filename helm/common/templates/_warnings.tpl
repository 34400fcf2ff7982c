{{- /* What is legal and perhaps not meant, for the notes: one block, empty if there is nothing. */}}
{{- define "common.warnings" -}}
{{- $capacity := fromJson (include "common.capacity" .) -}}
{{- $size := $capacity.workers -}}
{{- $idle := sub (mul (int64 $size.replicas) (int64 $size.actors)) (int64 $capacity.demand.actors) -}}
{{- if and (gt $idle (int64 0)) (gt (int64 $size.gpus) (int64 0)) }}
WARNING: {{ int64 $capacity.demand.actors }} actors leave room for {{ $idle }} more on {{ int64 $size.replicas }} workers: GPUs that are paid for and idle.
{{- end }}
{{- if and (gt (int64 $size.gpus) (int64 0)) (not (concat .Values.pods.tolerations .Values.workers.tolerations)) }}
WARNING: the workers tolerate no taints; GPU nodes that are tainted won't take them unless your cluster adds the toleration.
{{- end }}
{{- if .Values.run }}
{{- if not .Values.run.activeDeadlineSeconds }}
WARNING: run.activeDeadlineSeconds is not set: a run that neither ends nor fails, because its submitter finds no node, say, keeps its GPUs until you remove it.
{{- end }}
{{- if .Values.run.deletionRules }}
WARNING: no deletion rule can match a job that someone stops (`ray job stop`): the cluster and its GPUs then stay until `helm uninstall`.
{{- end }}
{{- end }}
{{- if not .Values.image.digest }}
WARNING: the image is named by its tag; set image.digest, so that what ran is certain.
{{- end }}
{{- end }}
