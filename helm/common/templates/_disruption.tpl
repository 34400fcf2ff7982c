{{- /*
Keeps the head's pod in place while nodes are drained: the attempt ends with the head, whereas workers are replaced.
It uses minAvailable because Kubernetes does not know how many pods a RayCluster wants. The number is larger than any release needs, since a
release may have several runs at once and none of their heads may be evicted.
*/}}
{{- define "common.disruptionBudget" -}}
{{- if .Values.podDisruptionBudget.enabled }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "common.name" . | quote }}
  namespace: {{ .Release.Namespace | quote }}
  labels:
    {{- include "common.labels" . | nindent 4 }}
spec:
  minAvailable: 1000
  selector:
    matchLabels:
      {{- include "common.selectorLabels" . | nindent 6 }}
      app.kubernetes.io/component: head
{{- end }}
{{- end }}
