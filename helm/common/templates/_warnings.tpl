{{- /* Warnings for the notes, about values that are valid but perhaps not intended. */}}
{{- define "common.warnings" -}}
{{- $capacity := fromJson (include "common.capacity" .) -}}
{{- $size := $capacity.workers -}}
{{- $idle := sub (mul (int64 $size.replicas) (int64 $size.actors)) (int64 $capacity.demand.actors) -}}
{{- if and (gt $idle (int64 0)) (gt (int64 $size.gpus) (int64 0)) }}
WARNING: {{ int64 $capacity.demand.actors }} actors leave room for {{ $idle }} more on {{ int64 $size.replicas }} workers: their GPUs cost money and are idle.
{{- end }}
{{- if and (gt (int64 $size.gpus) (int64 0)) (not (concat .Values.pods.tolerations .Values.workers.tolerations)) }}
WARNING: the workers tolerate no taints; they cannot run on tainted GPU nodes unless your cluster adds the toleration.
{{- end }}
{{- if .Values.run }}
{{- if not .Values.run.activeDeadlineSeconds }}
WARNING: run.activeDeadlineSeconds is not set: a run that neither ends nor fails, for example because its submitter finds no node, keeps its GPUs until you remove it.
{{- end }}
{{- if .Values.run.deletionRules }}
WARNING: no deletion rule can match a job that someone stops (`ray job stop`): the cluster and its GPUs then stay until `helm uninstall`.
{{- end }}
{{- end }}
{{- if not .Values.image.digest }}
WARNING: the image is named by its tag; set image.digest to identify exactly what ran.
{{- end }}
{{- end }}
