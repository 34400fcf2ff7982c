{{- /*
Who may talk to the release's pods, and to whom they may: nobody else in the cluster can reach Ray, which runs whatever it is sent.
Pods are found by the release, since the operator puts a random text into the name of a job's cluster.
Values come as dict root ports cluster submitters: ports of stores beside networkPolicy.storePorts, the name of a shared cluster
or "", whether other releases' submitters may come.
*/}}
{{- define "common.networkPolicy" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- if $policy.enabled }}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "common.name" .root | quote }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "common.labels" .root | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "common.selectorLabels" .root | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    {{- /* Ray's processes open ports as they like, so that within a release all are open. */}}
    - from:
        - podSelector:
            matchLabels:
              {{- include "common.selectorLabels" .root | nindent 14 }}
    - from:
        - namespaceSelector:
            {{- with $policy.operatorNamespace }}
            matchLabels:
              kubernetes.io/metadata.name: {{ . | quote }}
            {{- else }} {}
            {{- end }}
          podSelector:
            matchLabels:
              app.kubernetes.io/component: kuberay-operator
      ports:
        - {port: 8265, protocol: TCP}
    {{- if .submitters }}
    {{- /* Jobs of other releases in this namespace hand themselves in. */}}
    - from:
        - podSelector:
            matchLabels:
              app.kubernetes.io/part-of: ray-batch-inference
              app.kubernetes.io/component: submitter
      ports:
        - {port: 8265, protocol: TCP}
    {{- end }}
    {{- $monitoring := .root.Values.monitoring }}
    {{- if $monitoring.podMonitor.enabled }}
    - from:
        - namespaceSelector:
            {{- with $monitoring.prometheus.namespace }}
            matchLabels:
              kubernetes.io/metadata.name: {{ . | quote }}
            {{- else }} {}
            {{- end }}
          podSelector:
            {{- with $monitoring.prometheus.podLabels }}
            matchLabels:
              {{- toYaml . | nindent 14 }}
            {{- else }} {}
            {{- end }}
      ports:
        - {port: 8080, protocol: TCP}
    {{- end }}
    {{- with $policy.ingress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  egress:
    - to:
        - podSelector:
            matchLabels:
              {{- include "common.selectorLabels" .root | nindent 14 }}
    {{- with .cluster }}
    - to:
        - podSelector:
            matchLabels:
              ray.io/cluster: {{ . | quote }}
              ray.io/node-type: head
      ports:
        - {port: 8265, protocol: TCP}
    {{- end }}
    {{- include "common.egress" . | nindent 4 }}
{{- end }}
{{- end }}

{{- /* Where pods may go beside their release: dict root ports. */}}
{{- define "common.egress" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- /* The cluster's DNS, and the cache that some have on each node. */}}
- to:
    - namespaceSelector: {}
    - ipBlock: {cidr: 169.254.20.10/32}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- /* Object stores, weights, and the API server where Ray asks it for workers: addresses that no policy can know. */}}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except: [169.254.0.0/16]
    - ipBlock:
        cidr: "::/0"
        except: ["fd00:ec2::/32", "fe80::/10"]
  ports:
    {{- $ports := concat $policy.storePorts (default (list) .ports) }}
    {{- if .root.Values.autoscaling.enabled }}{{ $ports = concat $ports (list 443 6443) }}{{ end }}
    {{- range $ports | uniq }}
    - {port: {{ int64 . }}, protocol: TCP}
    {{- end }}
{{- with .ports }}
{{- /* A store may be a pod, whose address some networks do not take for one. */}}
- to:
    - namespaceSelector: {}
  ports:
    {{- range . }}
    - {port: {{ int64 . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- if $policy.metadataService }}
{{- /* GKE's metadata server and its port on the node, EC2's, EKS Pod Identity's. */}}
- to:
    - ipBlock: {cidr: 169.254.169.254/32}
    - ipBlock: {cidr: 169.254.169.252/32}
    - ipBlock: {cidr: 169.254.170.23/32}
    - ipBlock: {cidr: "fd00:ec2::/32"}
  ports:
    - {port: 80, protocol: TCP}
    - {port: 988, protocol: TCP}
{{- end }}
{{- with $policy.egress }}
{{ toYaml . }}
{{- end }}
{{- end }}
